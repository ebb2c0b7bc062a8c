// Who has seen what: vector clocks over the actors of a block, its threads and its copy engines.
//
// An access of actor a at a's tick n comes before whatever actor b does once b's clock for a has reached n. Clocks
// travel with barriers: who arrives leaves what it has seen, who has waited takes it (Lamport 1978; Flanagan, Freund,
// FastTrack, 2009).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastattn::sim {

using Clock = std::vector<uint32_t>;

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t actor = 0; actor < from.size(); ++actor) into[actor] = std::max(into[actor], from[actor]);
}

// What an actor has seen, and the part of it that a proxy fence has made visible to the asynchronous proxy.
struct Knowledge {
  Clock seen, fenced;

  void take(const Knowledge& other) {
    join(seen, other.seen);
    join(fenced, other.fenced);
  }
};

// The tick of a copy engine that one asynchronous operation has.
struct Stamp {
  uint32_t actor = 0, tick = 0;
};

}  // namespace fastattn::sim
