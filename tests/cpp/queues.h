// Queues for tests: messages that say by themselves who sent them, and messages that refer to a block.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <memory>
#include <optional>

#include "os/futex.h"
#include "pool/queue.h"
#include "processes.h"

namespace torchshm::tests {

using pool::Handle;
using pool::Member;
using pool::Mode;
using pool::Queue;

constexpr uint64_t kSecond = 1'000'000'000;

struct Note {
  uint64_t sender = 0, number = 0, bytes = 0;
};

inline std::unique_ptr<Queue> make(Member& member, uint64_t maxsize = 0) {
  auto queue = Queue::create(member, maxsize);
  EXPECT_TRUE(queue.ok()) << queue.status().what();
  return queue.take();
}

inline std::unique_ptr<Queue> open(Member& member, const Handle& handle) {
  auto queue = Queue::open(member, handle);
  EXPECT_TRUE(queue.ok()) << queue.status().what();
  return queue.take();
}

inline bool put(Queue& queue, uint64_t sender, uint64_t number, uint64_t bytes = sizeof(Note)) {
  auto message = queue.reserve(bytes);
  if (!message) return false;
  const Note note{sender, number, bytes};
  std::memcpy(message->data, &note, sizeof note);
  std::memset(message->data + sizeof note, static_cast<int>(number & 0xff), bytes - sizeof note);
  auto done = queue.publish(*message);
  if (done && *done) return true;
  queue.cancel(*message);
  return false;
}

inline std::optional<Note> take(Queue& queue) {
  auto message = queue.take();
  EXPECT_TRUE(message.ok()) << message.status().what();
  if (!message || !*message) return std::nullopt;
  Note note;
  std::memcpy(&note, (*message)->data, sizeof note);
  EXPECT_EQ((*message)->length, note.bytes);
  for (uint64_t i = sizeof note; i < note.bytes; i += 97)
    EXPECT_EQ(static_cast<uint64_t>((*message)->data[i]), note.number & 0xff);
  queue.finish(**message);
  return note;
}

// Waits for one.
inline std::optional<Note> take_within(Queue& queue, uint64_t nanoseconds) {
  const uint64_t end = os::boot_time() + nanoseconds;
  for (;;) {
    if (auto note = take(queue)) return note;
    if (os::boot_time() > end) return std::nullopt;
    queue.wait(Queue::For::kMessage, kSecond / 10);
  }
}

inline void expect_nothing_left(Member& member) {
  const auto stats = member.stats();
  EXPECT_EQ(stats.blocks, 0U);
  EXPECT_EQ(stats.tickets, 0U);
}

// A message that refers to a block of its sender's own, which holds nothing but `number`.
struct Parcelled {
  Queue::Message message;
  Handle handle;
};
inline std::optional<Parcelled> write(Queue& queue, uint64_t number) {
  const Queue::Busy busy(queue);
  auto block = queue.member().allocate(1 << 20, false, true);
  if (!block) return std::nullopt;
  std::memcpy(block->data, &number, sizeof number);
  auto handle = queue.member().issue(block->block, &queue.ref());
  queue.member().release_made(block->block);
  if (!handle) return std::nullopt;
  const std::array tickets = {*handle};
  auto message = queue.reserve(Handle::kBytes, tickets);
  if (!message) return std::nullopt;
  handle->write(reinterpret_cast<char*>(message->data));
  return Parcelled{*message, *handle};
}

// What it refers to, read and dropped.
inline std::optional<uint64_t> read(Queue& queue, const Queue::Message& message) {
  auto view = queue.member().redeem(Handle::read(reinterpret_cast<const char*>(message.data)), Mode::kReadWrite);
  if (!view) return std::nullopt;
  uint64_t number = 0;
  std::memcpy(&number, view->data, sizeof number);
  queue.member().release(view->block, Mode::kReadWrite);
  return number;
}

// Puts and takes until no more than that many blocks are live.
inline bool comes_down_to(Queue& queue, uint64_t blocks) {
  for (const uint64_t end = os::boot_time() + 20 * kSecond; os::boot_time() < end; ::usleep(1000)) {
    if (!put(queue, 9, 9) || !take(queue)) return false;
    queue.close_parcel();
    if (queue.member().stats().blocks <= blocks) return true;
  }
  return false;
}

}  // namespace torchshm::tests
