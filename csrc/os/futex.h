// Sleeping until a word in shared memory changes.
//
// Shared: the word. A process that dies while it sleeps leaves nothing behind; one that dies before it wakes others leaves them asleep
// until their time is up, so waits are taken in slices.
#pragma once

#include <atomic>
#include <cstdint>

namespace torchshm::os {

enum class Wait : uint8_t { kChanged, kTimedOut, kInterrupted };

// Sleeps while `word` is `seen`, for `nanoseconds` at most. kChanged may come without a change.
Wait wait(const std::atomic<uint32_t>& word, uint32_t seen, uint64_t nanoseconds);
// Returns how many have been woken.
uint32_t wake_one(const std::atomic<uint32_t>& word);
void wake_all(const std::atomic<uint32_t>& word);

uint64_t boot_time();  // ns; goes on while the machine is suspended
uint64_t real_time();  // ns since 1970

}  // namespace torchshm::os
