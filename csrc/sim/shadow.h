// A second memory beside a block's shared memory: which bytes were written, and who last read and wrote each word.
//
// An access is a race when another actor's access to the same bytes, one of them a write, is not known to come before
// it. It lacks a proxy fence when it is the asynchronous proxy's (TMA, wgmma) and an ordinary write comes before it
// only as ordinary accesses see it. Every word remembers the last four accesses that differ, as ThreadSanitizer does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "clocks.h"

namespace fastattn::sim {

enum Access : uint8_t {
  kRead = 0,
  kWrite = 1,
  kAsync = 2,   // by the asynchronous proxy
  kAtomic = 4,  // may happen at the same time as other atomic accesses
};

class Shadow {
 public:
  void reset(int bytes);
  bool on() const { return !words_.empty(); }

  // What is wrong with the access of `actor` at its `tick`, who knows `knows`; empty if nothing is.
  struct Finding {
    bool race = false, unfenced = false, unwritten = false;
    uint32_t offset = 0;
    uint32_t actor = 0;  // the other one
    uint8_t access = 0;
    const char* instruction = nullptr;
  };
  bool check(uint32_t offset, uint32_t bytes, uint8_t access, Stamp stamp, const Knowledge& knows,
             const char* instruction, Finding& finding);

 private:
  struct Record {
    uint32_t tick = 0;
    uint16_t actor = 0;
    uint8_t instruction = 0;
    uint8_t mask_access = 0;  // bytes of the word in the upper four bits, Access in the lower four
  };
  struct Word {
    Record records[4];
  };
  bool check_word(uint32_t word, uint8_t mask, uint8_t access, Stamp stamp, const Knowledge& knows, uint8_t instruction,
                  Finding& finding);
  uint8_t number_of(const char* instruction);

  std::vector<Word> words_;
  std::vector<uint8_t> written_;  // four bits a word
  std::vector<const char*> instructions_;
  uint32_t turn_ = 0;
};

struct Block;
struct Thread;

// The running thread accesses shared memory itself.
void own_access(uint32_t address, uint32_t bytes, uint8_t access);
// An operation of the copy engine or the tensor cores does, which the thread issues with this stamp and knowledge.
void engine_access(Thread& thread, uint32_t address, uint32_t bytes, uint8_t access, Stamp stamp,
                   const Knowledge& knows);
// A new tick of one of the block's engines.
Stamp new_stamp(Block& block);
// From now on the thread comes after the operation.
void see(Thread& thread, Stamp stamp);

}  // namespace fastattn::sim
