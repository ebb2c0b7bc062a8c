#include "shadow.h"

namespace fastattn::sim {

void Shadow::reset(int bytes) {
  words_.assign(static_cast<size_t>(bytes + 3) / 4, Word());
  written_.assign(words_.size(), 0);
  instructions_.assign(1, "");
}

uint8_t Shadow::number_of(const char* instruction) {
  for (size_t at = instructions_.size(); at-- > 1;) {
    if (instructions_[at] == instruction) return static_cast<uint8_t>(at);
  }
  instructions_.push_back(instruction);
  return static_cast<uint8_t>(instructions_.size() - 1);
}

bool Shadow::check_word(uint32_t word, uint8_t mask, uint8_t access, Stamp stamp, const Knowledge& knows,
                        uint8_t instruction, Finding& finding) {
  const bool writes = (access & kWrite) != 0;
  const auto found = [&](const Record& record) {
    finding.offset = 4 * word + static_cast<uint32_t>(__builtin_ctz(mask));
    finding.actor = record.actor;
    finding.access = record.mask_access & 15;
    finding.instruction = instructions_[record.instruction];
    return false;
  };
  Record* place = nullptr;
  for (Record& record : words_[word].records) {
    if (record.tick == 0) {
      if (place == nullptr) place = &record;
      continue;
    }
    const uint8_t other = record.mask_access & 15;
    const uint8_t shared = mask & (record.mask_access >> 4);
    const bool ordered = record.tick <= knows.seen[record.actor];
    const bool conflict = shared != 0 && (writes || (other & kWrite) != 0) && record.actor != stamp.actor;
    if (conflict && !ordered && (access & other & kAtomic) == 0) {
      finding.race = true;
      return found(record);
    }
    // Ordinary writes, the operation's own thread's too, reach the asynchronous proxy through a fence alone.
    const bool crosses = (access & kAsync) != 0 && (other & (kAsync | kAtomic)) == 0 && (other & kWrite) != 0;
    if (shared != 0 && crosses && record.tick > knows.fenced[record.actor]) {
      finding.unfenced = true;
      return found(record);
    }
    // What the new access makes superfluous: whoever comes after it comes after that one as well.
    const bool covered = (record.mask_access >> 4 & ~mask) == 0 && ordered && (writes || (other & kWrite) == 0) &&
                         ((access & kAtomic) == 0 || (other & kAtomic) != 0);
    if (covered) place = &record;
  }
  if ((access & (kWrite | kAtomic)) == 0 && (~written_[word] & mask) != 0) {
    finding.unwritten = true;
    finding.offset = 4 * word + static_cast<uint32_t>(__builtin_ctz(~written_[word] & mask));
    return false;
  }
  if (place == nullptr) place = &words_[word].records[turn_++ % 4];
  *place = {stamp.tick, static_cast<uint16_t>(stamp.actor), instruction, static_cast<uint8_t>(mask << 4 | access)};
  if (writes) written_[word] |= mask;
  return true;
}

bool Shadow::check(uint32_t offset, uint32_t bytes, uint8_t access, Stamp stamp, const Knowledge& knows,
                   const char* instruction, Finding& finding) {
  const uint8_t number = number_of(instruction);
  const uint32_t stop = offset + bytes;
  for (uint32_t word = offset / 4; 4 * word < stop; ++word) {
    uint8_t mask = 15;
    if (4 * word < offset) mask &= static_cast<uint8_t>(15 << (offset - 4 * word));
    if (4 * word + 4 > stop) mask &= static_cast<uint8_t>(15 >> (4 * word + 4 - stop));
    if (!check_word(word, mask, access, stamp, knows, number, finding)) return false;
  }
  return true;
}

}  // namespace fastattn::sim
