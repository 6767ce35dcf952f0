#include "soak_worker.h"

#include <dirent.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <set>
#include <utility>

#include "base/failpoint.h"
#include "pool/members.h"

namespace torchshm::torture {
namespace {

using pool::Mode;

constexpr size_t kMostItems = 20;
constexpr size_t kMostRemembered = 16;
constexpr uint32_t kMostForked = 12;   // zombies until the worker ends, so that their pids are not used again
constexpr uint64_t kWrittenEvery = 5;  // a private write changes every fifth word

uint64_t word_at(uint64_t seed, uint64_t i) {
  uint64_t x = (seed + i) * 0x9e3779b97f4a7c15;
  return x ^ x >> 29;
}

Board* crashing = nullptr;

void crashed(int signal, siginfo_t* info, void*) {
  crashing->report("pid %d: signal %d at %p", ::getpid(), signal, info->si_addr);
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

uint64_t open_descriptors() {
  DIR* folder = ::opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  uint64_t n = 0;
  while (const dirent* entry = ::readdir(folder)) n += entry->d_name[0] != '.' ? 1 : 0;
  ::closedir(folder);
  return n - 1;
}

}  // namespace

// From here to the end of the scope, the process is inside an operation of the pool.
class Worker::Timed {
 public:
  Timed(Worker& worker, Action action) : worker_(worker), action_(action), began_(now_ns()) {
    Entry* entry = worker.entry_;
    entry->since.store(began_);
    entry->action.store(static_cast<uint32_t>(action));
  }
  ~Timed() {
    worker_.entry_->action.store(0);
    const auto n = static_cast<size_t>(action_);
    worker_.board_.actions[n].fetch_add(1, std::memory_order_relaxed);
    // Includes the time for which it was stopped.
    const uint64_t took = now_ns() - began_;
    uint64_t longest = worker_.board_.longest_ns[n].load(std::memory_order_relaxed);
    while (longest < took && !worker_.board_.longest_ns[n].compare_exchange_weak(longest, took)) {
    }
  }
  Timed(const Timed&) = delete;

 private:
  Worker& worker_;
  Action action_;
  uint64_t began_;
};

Entry* Worker::enter(Board& board) {
  for (Entry& entry : board.entries) {
    pid_t nobody = 0;
    if (entry.pid.compare_exchange_strong(nobody, ::getpid())) return &entry;
  }
  return nullptr;
}

void Worker::watch_for_crashes(Board& board) {
  crashing = &board;
  struct sigaction action {};
  action.sa_sigaction = crashed;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (const int signal : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGTRAP}) ::sigaction(signal, &action, nullptr);
}

void Worker::run(uint64_t steps) {
  descriptors_ = open_descriptors();
  for (uint64_t n = 0; n < steps; ++n) {
    if (board_.pause.load() != 0) park();
    if (n % 64 == 0 && now_ns() - board_.heartbeat.load() > 60'000'000'000) ::_exit(0);  // nobody is watching any more
    if (pick(300) == 0) arm(board_, random_());
    step(true);
  }
  // Ordinary ends: with everything released, and with nothing.
  if (pick(2) == 0) release_all();
  board_.left.fetch_add(1, std::memory_order_relaxed);
}

void Worker::arm(Board& board, uint64_t random) {
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  failpoint::Plan plan;
  const bool stop = random % 3 == 0;
  plan.action = stop ? failpoint::Action::kStop : failpoint::Action::kKill;
  plan.at = 1 + random / 3 % (random % 7 == 0 ? 400 : 24);  // an operation has few, reaping and forking have many
  failpoint::arm(plan);
  (stop ? board.armed_stops : board.armed_kills).fetch_add(1, std::memory_order_relaxed);
#else
  (void)board, (void)random;
#endif
}

void Worker::step(bool may_fork) {
  const uint64_t n = pick(1000);
  if (n < 180) {
    allocate();
  } else if (n < 340) {
    send();
  } else if (n < 640) {
    (void)receive();
  } else if (n < 670) {
    again();
  } else if (n < 720) {
    view();
  } else if (n < 800) {
    write();
  } else if (n < 980) {
    if (items_.size() > kept_) release(kept_ + pick(items_.size() - kept_));
  } else if (n < 984) {
    const Timed timed(*this, Action::kTrim);
    (void)member_->trim(pick(2) == 0 ? 0 : uint64_t{4} << 20);
  } else if (n < 988) {
    const Timed timed(*this, Action::kStats);
    (void)member_->stats();
  } else if (n < 993) {
    const Timed timed(*this, Action::kReap);
    (void)member_->reap();
  } else if (may_fork) {
    fork_off();
  }
}

// ---- what is read and written

void Worker::fill(const Item& item) const {
  for (uint64_t i = 0; i < item.bytes / 8; ++i) {
    const uint64_t word = word_at(item.seed, i);
    std::memcpy(item.data + i * 8, &word, 8);
  }
}

bool Worker::verify(const Item& item, const char* when) {
  const uint64_t words = item.bytes / 8;
  // Large ones in steps that are no multiple of a page, mostly.
  const uint64_t step = words > 4096 && pick(16) != 0 ? 61 : 1;
  const auto written = item.mode == Mode::kCopyOnWrite ? written_.find(item.block) : written_.end();
  for (uint64_t i = step == 1 ? 0 : pick(step); i < words; i += step) {
    const uint64_t word = __atomic_load_n(reinterpret_cast<const uint64_t*>(item.data) + i, __ATOMIC_RELAXED);
    const bool mine = written != written_.end() && i % kWrittenEvery == 1;
    const uint64_t expected = word_at(mine ? written->second : item.seed, i);
    const unsigned ignored = item.shared_writes && !mine ? 8 : 0;
    if (word >> ignored == expected >> ignored) continue;
    const pool::BlockValue now = pool::BlockValue::of(member_->arena().block(item.block).value.load());
    board_.report(
        "pid %d, %s: block %u (now generation %lu, count %u, live %d), %lu bytes, mode %d%s%s%s: word %lu is %lx, not "
        "%lx",
        ::getpid(), when, item.block, now.generation, now.count, now.live, item.bytes, static_cast<int>(item.mode),
        item.own ? ", own" : "", item.shared_writes ? ", written by all" : "", mine ? ", written here" : "", i, word,
        expected);
    return false;
  }
  board_.verified.fetch_add(words / step * 8, std::memory_order_relaxed);
  return true;
}

void Worker::write() {
  if (items_.empty()) return;
  const Timed timed(*this, Action::kWrite);
  Item& item = items_[pick(items_.size())];
  const uint64_t words = item.bytes / 8;
  if (words == 0 || !verify(item, "before a write")) return;
  if (item.own) {
    item.seed = random_();
    fill(item);
  } else if (item.mode == Mode::kCopyOnWrite) {
    const uint64_t seed = written_[item.block] = random_();
    for (uint64_t i = 1; i < words; i += kWrittenEvery)
      __atomic_store_n(reinterpret_cast<uint64_t*>(item.data) + i, word_at(seed, i), __ATOMIC_RELAXED);
    board_.private_writes.fetch_add(1, std::memory_order_relaxed);
  } else if (item.mode == Mode::kReadWrite && item.shared_writes) {
    for (uint64_t n = 0; n < 100; ++n) {
      const uint64_t i = pick(words);
      __atomic_store_n(reinterpret_cast<uint64_t*>(item.data) + i, (word_at(item.seed, i) & ~uint64_t{255}) | pick(256),
                       __ATOMIC_RELAXED);
    }
  }
}

// ---- operations

void Worker::allocate() {
  if (items_.size() >= kMostItems) return;
  Item item;
  item.bytes = (uint64_t{8} << pick(pick(8) == 0 ? 20 : 16)) + pick(5000);
  item.shared_writes = pick(4) == 0;
  const bool whole = pick(2) == 0;
  item.seed = random_();
  {
    const Timed timed(*this, Action::kAllocate);
    auto view = member_->allocate(item.bytes, whole);
    if (!view) {
      board_.full.fetch_add(1, std::memory_order_relaxed);
      if (view.code() != Code::kFull) board_.report("pid %d: allocate: %s", ::getpid(), view.status().what().c_str());
      return;
    }
    item.block = view->block;
    item.data = view->data;
    item.whole = whole;
  }
  fill(item);
  items_.push_back(item);
}

void Worker::post(const Message& message) {
  // A full pipe loses the message, as a receiver that is killed would.
  if (::write(board_.pipes[pick(board_.workers)][1], &message, sizeof message) != sizeof message)
    board_.lost.fetch_add(1, std::memory_order_relaxed);
}

void Worker::send() {
  if (items_.empty()) return;
  const Item& item = items_[pick(items_.size())];
  Message message{};
  message.seed = item.seed;
  message.bytes = item.bytes;
  message.mode = item.mode;
  message.shared_writes = item.shared_writes;
  message.whole = item.whole;
  message.from = static_cast<uint32_t>(::getpid());
  bool by_reference = !item.own;
  if (item.mode == Mode::kCopyOnWrite) {
    const auto found = member_->find(item.data);
    if (!found || found->block != item.block || found->mode != item.mode || found->offset != 0) {
      board_.report("pid %d: find() does not know block %u", ::getpid(), item.block);
      return;
    }
    by_reference = !member_->modified(*found, item.data, item.data + item.bytes);
    if (by_reference && item.bytes >= 16 && written_.contains(item.block)) {
      board_.report("pid %d: a write to the private view of block %u was not noticed", ::getpid(), item.block);
      return;
    }
  }
  const Timed timed(*this, Action::kSend);
  if (by_reference && pick(8) != 0) {
    const auto handle = member_->issue(item.block);
    if (!handle) {
      board_.report("pid %d: issue: %s", ::getpid(), handle.status().what().c_str());
      return;
    }
    message.handle = *handle;
    post(message);
    if (pick(10) == 0) {
      board_.duplicated.fetch_add(1, std::memory_order_relaxed);
      post(message);
    }
    return;
  }
  // A copy made for the receiver; nobody else looks at it.
  Item copy;
  copy.seed = message.seed = random_();
  copy.bytes = item.bytes;
  message.whole = pick(2) == 0;
  message.mode = Mode::kReadWrite;
  message.own = true;
  message.shared_writes = false;
  auto view = member_->allocate(copy.bytes, message.whole, true);
  if (!view) {
    board_.full.fetch_add(1, std::memory_order_relaxed);
    if (view.code() != Code::kFull) board_.report("pid %d: allocate: %s", ::getpid(), view.status().what().c_str());
    return;
  }
  copy.data = view->data;
  fill(copy);
  const auto handle = member_->issue(view->block);
  if (handle) {
    message.handle = *handle;
  } else {
    board_.report("pid %d: issue: %s", ::getpid(), handle.status().what().c_str());
  }
  member_->release_made(view->block);
  if (handle) post(message);
}

bool Worker::receive() {
  Message message{};
  if (items_.size() >= kMostItems) release(kept_ + pick(items_.size() - kept_));
  if (::read(board_.pipes[index_][0], &message, sizeof message) != static_cast<ssize_t>(sizeof message)) return false;
  if (pick(25) == 0) {
    board_.lost.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  take(message, true);
  if (pick(12) == 0 && !message.own) take(message, false);  // unpickled twice
  if (!message.own && pick(8) == 0) {
    if (remembered_.size() == kMostRemembered) remembered_.erase(remembered_.begin());
    remembered_.push_back(message);
  }
  return true;
}

void Worker::again() {
  if (!remembered_.empty() && items_.size() < kMostItems) take(remembered_[pick(remembered_.size())], false);
}

void Worker::take(const Message& message, bool first) {
  // A receiver may ask for another mode than the sender's, for less only.
  Mode mode = message.mode;
  if (!message.own && mode == Mode::kReadWrite && pick(3) == 0) mode = Mode::kRead;
  if (!message.own && message.whole && pick(3) == 0) mode = Mode::kCopyOnWrite;
  const Timed timed(*this, first ? Action::kReceive : Action::kAgain);
  auto view = member_->redeem(message.handle, mode, message.own);
  if (!view) {
    board_.stale.fetch_add(1, std::memory_order_relaxed);
    if (first) board_.first_stale.fetch_add(1, std::memory_order_relaxed);
    if (view.code() != Code::kStale) {
      board_.report("pid %d: redeem: %s", ::getpid(), view.status().what().c_str());
      return;
    }
    // It may have been taken back, or redeemed elsewhere. What it may not: be refused while it is out.
    const auto ticket = pool::TicketValue::of(member_->arena().ticket(message.handle.ticket).value.load());
    if (ticket.sender != 0 && ticket.nonce == message.handle.nonce && ticket.block == message.handle.block)
      board_.report("pid %d: block %u is gone while ticket %u of it is out", ::getpid(), message.handle.block,
                    message.handle.ticket);
    return;
  }
  if (view->length < message.bytes) {
    board_.report("pid %d: block %u has %lu bytes, was sent with %lu", ::getpid(), view->block, view->length,
                  message.bytes);
    return;
  }
  Item item;
  item.data = view->data;
  item.bytes = message.bytes;
  item.seed = message.seed;
  item.block = view->block;
  item.mode = mode;
  item.shared_writes = message.shared_writes;
  item.own = message.own;
  item.whole = message.whole;
  items_.push_back(item);
  (void)verify(item, first ? "received" : "received again");
}

void Worker::view() {
  if (items_.empty() || items_.size() >= kMostItems) return;
  Item item = items_[pick(items_.size())];
  if (item.own) return;
  // Never more than what it was received with.
  const Mode mode = item.whole && pick(2) == 0 ? Mode::kCopyOnWrite : Mode::kRead;
  const Timed timed(*this, Action::kView);
  auto view = member_->view(item.block, mode);
  if (!view) {
    board_.report("pid %d: view of block %u: %s", ::getpid(), item.block, view.status().what().c_str());
    return;
  }
  item.data = view->data;
  item.mode = mode;
  items_.push_back(item);
  (void)verify(item, "viewed");
}

void Worker::release(size_t i) {
  const Item item = items_[i];
  (void)verify(item, "before its release");
  items_[i] = items_.back();
  items_.pop_back();
  if (item.mode == Mode::kCopyOnWrite) {
    bool others = false;
    for (const Item& other : items_) others = others || (other.block == item.block && other.mode == item.mode);
    if (!others) written_.erase(item.block);
  }
  const Timed timed(*this, Action::kRelease);
  member_->release(item.block, item.mode);
}

void Worker::release_all() {
  while (items_.size() > kept_) release(items_.size() - 1);
}

void Worker::keep(uint64_t bytes) {
  Item item;
  item.bytes = bytes;
  item.seed = random_();
  auto view = member_->allocate(bytes, false);
  if (!view) {
    board_.report("the first allocation: %s", view.status().what().c_str());
    return;
  }
  item.block = view->block;
  item.data = view->data;
  fill(item);
  items_.insert(items_.begin(), item);
  ++kept_;
}

void Worker::verify_kept() {
  for (size_t i = 0; i < kept_; ++i) (void)verify(items_[i], "kept");
}

bool Worker::drain(uint32_t index) {
  release_all();
  const uint32_t mine = std::exchange(index_, index);
  const bool any = receive();
  index_ = mine;
  release_all();
  return any;
}

void Worker::before_fork() {
  // Both see the writes of either to small blocks after a fork; so neither writes.
  for (Item& item : items_) {
    const auto extent = member_->arena().extent(item.block);
    if (item.own && extent && (extent->offset % pool::kPage != 0 || extent->length % pool::kPage != 0))
      item.own = false;
  }
}

void Worker::become(pool::Member& member, Entry* entry, uint32_t index, uint64_t seed) {
  member_ = &member;
  entry_ = entry;
  index_ = index;
  random_.seed(seed);
  kept_ = 0;
  forked_ = 0;
  for (const Item& item : items_) (void)verify(item, "in a forked child");
}

void Worker::fork_off() {
  if (forked_ >= kMostForked || depth_ >= 2) return;
  ++forked_;
  before_fork();
  const uint64_t seed = random_(), steps = 1 + pick(400);
  entry_->since.store(now_ns());
  entry_->action.store(static_cast<uint32_t>(Action::kFork));
  const pid_t pid = ::fork();
  if (pid != 0) {
    entry_->action.store(0);
    board_.actions[static_cast<size_t>(Action::kFork)].fetch_add(1, std::memory_order_relaxed);
    if (pid < 0) board_.report("pid %d: fork: errno %d", ::getpid(), errno);
    return;
  }
  Entry* entry = enter(board_);
  if (entry == nullptr) ::_exit(0);
  ++depth_;
  become(*member_, entry, index_, seed);
  run(steps);
  ::_exit(0);
}

// ---- rest

uint64_t Worker::held() const {
  std::set<uint32_t> blocks;
  for (const Item& item : items_) blocks.insert(item.block);
  return blocks.size();
}

void Worker::count_descriptors() {
  uint64_t open = open_descriptors();
  for (int again = 0; again < 20 && open != descriptors_; ++again) {  // the janitor may just have one open
    ::usleep(1000);
    open = open_descriptors();
  }
  if (open != descriptors_)
    board_.report("pid %d: %lu descriptors are open, %lu were at the start", ::getpid(), open, descriptors_);
}

void Worker::park() {
  for (const Item& item : items_) (void)verify(item, "at rest");
  count_descriptors();
  const uint32_t pause = board_.pause.load();
  if (pause == 0) return;
  entry_->held.store(held());
  entry_->parked.store(pause);
  while (board_.pause.load() == pause && now_ns() - board_.heartbeat.load() < 60'000'000'000) ::usleep(1000);
  entry_->parked.store(0);
}

}  // namespace torchshm::torture
