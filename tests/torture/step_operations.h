// The operations that are stepped over, and the pool in which that happens.
//
// Shared: the pool. The survivor is the tracer itself: it holds blocks with patterns in them, and a message of its own is under way.
// `before` and `between` run in the survivor, before the other process exists and when it is ready; `prepare` and `act` in the other.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "pool/members.h"
#include "pool/queue.h"

namespace torchshm::torture {

constexpr uint32_t kNone = ~uint32_t{0};

struct Held {
  uint32_t block;
  pool::Mode mode;
  std::byte* data;
  uint64_t bytes;
  unsigned char pattern;
};

struct Scene {
  explicit Scene(uint64_t limit);
  ~Scene();

  std::unique_ptr<pool::Member> survivor;
  std::vector<Held> held;  // by the survivor
  pool::Handle letter;     // the survivor's message: a block that nobody holds, filled with kLetter
  pool::Handle stale;      // of a block that was released
  pool::Handle handle{};   // for the operation
  uint32_t block = kNone;  // the other process's
  pool::Member* self = nullptr;
  std::vector<uint32_t> own;           // blocks that a random life holds
  std::unique_ptr<pool::Queue> queue;  // the survivor's
  std::unique_ptr<pool::Queue> mine;   // the other process's view of it

  // A block of the survivor's, filled with a pattern that is looked at after the kill. False where there is no room.
  bool hold(uint64_t bytes, bool whole_pages = false);
  // A message whose block nobody holds.
  std::optional<pool::Handle> send(uint64_t bytes, bool whole_pages = false);
  // Lets go of the last block that hold() made.
  void let_go();
  // Every ticket that is out but the letter's and those of queues, as handles.
  std::vector<pool::Handle> messages() const;
  // The other process's membership, in the other process. Adopted: its forks run the handlers.
  void join();
};

// A life that ends by SIGKILL, in a process of its own.
void live_and_die(Scene& scene, void (*life)(Scene&));

constexpr unsigned char kLetter = 0x5a;
constexpr uint64_t kLetterBytes = 50000;

using Hook = std::function<void(Scene&)>;

struct Operation {
  std::string name;
  const char* family;  // allocate, hold, release, issue, redeem, reap, queue: those are stepped through without a gap
  Hook before = nullptr, prepare = nullptr, between = nullptr, act = nullptr;
  bool joins = true;   // before `prepare`; else it is `act` that does
  bool child = false;  // it is the child of act's fork that is stepped and killed
};

const std::vector<Operation>& operations();

// Those on a queue that the survivor has too (step_queue.cc), and what the survivor finds in it afterwards: whole messages, each once; that
// it goes on; and that what the dead had in hand is given back while the queue lives. The queue ends with that.
std::vector<Operation> queue_operations();
std::string verify_queue(Scene& scene);

// In the calling process: one or a few random steps of a life; with what the pool holds now as the only memory of what was.
void random_steps(Scene& scene, std::mt19937_64& random, int steps);

}  // namespace torchshm::torture
