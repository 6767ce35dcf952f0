// A member for tests: a block that it received, and leases that are all taken.
#pragma once

#include <cstring>

#include "processes.h"

namespace torchshm::tests {

// A block that came in a message made for the receiver.
inline pool::Member::View receive(pool::Member& receiver, uint64_t bytes, bool whole_pages = true,
                                  pool::Mode mode = pool::Mode::kReadWrite) {
  auto sender = tests::join(receiver);
  auto block = sender->allocate(bytes, whole_pages);
  EXPECT_TRUE(block.ok());
  std::memset(block->data, 1, bytes);
  auto handle = sender->issue(block->block);
  EXPECT_TRUE(handle.ok());
  auto view = receiver.redeem(*handle, mode, true);
  EXPECT_TRUE(view.ok()) << view.status().what();
  sender->release(block->block, pool::Mode::kReadWrite);
  return *view;
}

inline void take_all_slots(pool::Arena& arena) {
  for (uint32_t slot = 0; slot < pool::kMaxLeases; ++slot) {
    uint64_t expected = pool::kLeaseFree;
    (void)arena.lease(slot).word.compare_exchange_strong(expected, uint64_t{1} << 40);  // neither free nor live
  }
}

inline void give_slots_back(pool::Arena& arena) {
  for (uint32_t slot = 0; slot < pool::kMaxLeases; ++slot) {
    uint64_t expected = uint64_t{1} << 40;
    (void)arena.lease(slot).word.compare_exchange_strong(expected, pool::kLeaseFree);
  }
}

}  // namespace torchshm::tests
