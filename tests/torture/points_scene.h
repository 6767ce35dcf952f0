// One process in a trial: its membership, the blocks that it holds with their patterns, and what it can ask of others.
//
// Private to the process that made it. When the process dies here: that is what the campaign is for; whoever started it checks.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "points_board.h"
#include "pool/member.h"

namespace torchshm::store {
class Catalogue;
}

namespace torchshm::torture {

constexpr uint64_t kSmallBytes = 5000;
constexpr uint64_t kLargeBytes = uint64_t{600} << 10;
constexpr uint64_t kTwoChunks = (uint64_t{2} << 20) + 70000;
constexpr uint64_t kRunBytes = (uint64_t{4} << 20) + 70000;  // three chunks
constexpr uint64_t kLimit = uint64_t{16} << 20;
constexpr uint64_t kWarm = uint64_t{1} << 40;

constexpr uint64_t kMaking = ~uint64_t{0};  // seed of a block in the making

struct Held {
  uint32_t block = 0;
  pool::Mode mode = pool::Mode::kReadWrite;
  std::byte* data = nullptr;
  uint64_t bytes = 0, seed = 0;
};

void fill(const Held& held);
bool intact(const Held& held);

// The member of the process that runs the trials; its mappings are inherited by all others.
extern pool::Member* driver;
// Descriptors whose locks are other processes' signs of life: a child closes them first.
extern std::vector<int> inherited_lives;

class Scene {
 public:
  Scene(int data, int control) : data_fd(data), control_fd(control) {}
  Scene(const Scene&) = delete;

  // Joins the pool; wrong() when that fails.
  void join();
  Status try_join();
  // Counts as this process's member from here on; handlers for fork are installed.
  void adopt();

  Held& hold(uint64_t bytes, bool whole_pages = false);
  Held& keep(const pool::Member::View& view, uint64_t bytes, uint64_t seed, pool::Mode mode = pool::Mode::kReadWrite);
  Held& receive(Message& message, pool::Mode mode = pool::Mode::kReadWrite, bool exclusive = false);
  void release(size_t index);  // looks at the bytes first
  void release_all();
  // Puts a message with the block into the street, where the survivor picks it up.
  Status post(const Held& held);
  // A further process: joins, works, is killed at the named point (at the end when null).
  void victim(const std::function<void(Scene&)>& work, const char* dies_at = nullptr);
  // A further process that does its work and leaves.
  void helper(const std::function<void(Scene&)>& work);
  // Lowers the limit to what is committed and not idle now, and `room` more.
  void press(uint64_t room);
  uint64_t committed(bool idle_too = true) const;

  __attribute__((format(printf, 2, 3))) void wrong(const char* format, ...);
  bool fine() const { return fine_; }

  const int data_fd, control_fd;
  pool::Member* member = nullptr;
  std::unique_ptr<pool::Member> own;
  std::vector<Held> held;
  uint64_t seed = 1;
  std::shared_ptr<store::Catalogue> names;  // where the campaign is about a store

 private:
  bool fine_ = true;
};

// In a child: `body` in a process of its own in which the locks of its ancestors are closed. Returns the pid.
pid_t begin(const std::function<int()>& body);
int wait_for(pid_t pid);

// ---- the operations

enum : uint32_t {
  kNoMember = 1,     // joins by itself
  kInbox = 2,        // the driver sends a small and a large block that it keeps
  kGift = 4,         // ... a small one that it does not keep
  kLargeGift = 8,    // ... a large one
  kEmptyChunk = 16,  // the driver owns a chunk with nothing in it
  kGone = 32,        // a handle whose block is gone
  kUsedUp = 64,      // the inbox was received by somebody else already
  kManyGifts = 128,
  kParked = 256,      // the survivor is not at work meanwhile
  kReaps = 512,       // takes a victim's lease back
  kMayFill = 1024,    // makes the pool full: may fail with kFull
  kOnlyAlone = 2048,  // no kills during its recovery: the same as another's, but long
  kForks = 4096,
  kRaisesLimit = 8192,
  kLong = 16384,    // so many points that the short form leaves most of them out
  kFresh = 32768,   // in a session of its own
  kAdopts = 65536,  // becomes a member for good
  kOwn = 131072,    // of the subject's own
};

struct Operation {
  const char* name;
  uint32_t flags;
  std::function<void(Scene&)> prepare;
  std::function<Status(Scene&)> act;
};

const std::vector<Operation>& operations();

// What a program of this kind is about: its operations, whose points they must reach, and what it does at each stage of a trial beyond
// what is done to every pool. A stage that it has nothing to do in is empty.
struct Subject {
  const char* name;     // of the program, and of its result
  const char* program;  // as a violation prints it
  bool (*counts)(std::string_view room, std::string_view file,
                 std::string_view point);                   // whether its operations must reach the point
  std::function<void(Scene&driver)> open = {}, close = {};  // a session
  std::function<void(Scene& driver, const Operation&)> set_up = {};
  std::function<void(Scene& survivor, std::mt19937_64& random)> work = {};  // now and then
  std::function<void(Scene&)> get_ready = {},
                              recover = {};  // one that recovers from the dead, before and after it reaps
  std::function<std::string(Scene& driver, int rounds)> while_stopped = {};  // what is wrong
  std::function<std::string(Scene& driver, const Operation&)> verify = {};   // what is wrong; the dead were reaped
};
const Subject& subject();

}  // namespace torchshm::torture
