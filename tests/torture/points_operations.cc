// Every operation on a pool, each with what must be there before it. prepare() passes points unharmed; act() is what is killed,
// failed and stopped. act() returns an error where a fault may make it fail; what it must not do at all goes to Scene::wrong().
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "os/event_fd.h"
#include "os/lock.h"
#include "os/memfd.h"
#include "points_scene.h"
#include "pool/checker.h"
#include "pool/queue.h"

namespace torchshm::torture {
namespace {

using pool::Member;
using pool::Mode;

Status keep_or_status(Scene& s, Result<Member::View> view, uint64_t bytes) {
  if (!view) return std::move(view.status());
  s.keep(*view, bytes, ++s.seed);
  fill(s.held.back());
  return {};
}

Status allocate(Scene& s, uint64_t bytes, bool whole_pages = false) {
  return keep_or_status(s, s.member->allocate(bytes, whole_pages), bytes);
}

Status redeem(Scene& s, Message& message, Mode mode = Mode::kReadWrite, bool exclusive = false) {
  if (&message == &here.board->gift) message.state.store(kClaimed);
  auto view = s.member->redeem(message.handle, mode, exclusive);
  if (!view) {
    // A fault may fail it, but never as if the block were gone.
    if (view.code() == Code::kStale && !here.board->tolerant) s.wrong("a block that is there was called stale");
    return std::move(view.status());
  }
  s.keep(*view, message.bytes, message.seed, mode);
  if (!intact(s.held.back())) s.wrong("block %u was received with other data", view->block);
  return {};
}

void last(Scene& s) { s.release(s.held.size() - 1); }

// A block of a dead process that this one still holds: its chunk is an orphan once the dead is reaped.
void inherit_from_victim(Scene& s) {
  s.victim([](Scene& v) {
    const Held& block = v.hold(kSmallBytes);
    auto handle = v.member->issue(block.block);
    Message& note = here.board->gone;
    if (handle) note.handle = *handle;
    note.seed = block.seed;
    note.bytes = block.bytes;
  });
  s.receive(here.board->gone);
  (void)s.member->reap();
}

Status forked(Scene& s, bool in_parent, bool in_child, bool handlers) {
  static bool parent_dies = true, child_dies = true;
  parent_dies = in_parent;
  child_dies = in_child;
  here.hook = [](const char* name) {
    // The first points that parent and child pass on their own.
    if (!parent_dies && std::strcmp(name, "fork.parent") == 0) failpoint::disarm();
    if (!child_dies && std::strcmp(name, "become.child") == 0) failpoint::disarm();
  };
  const uint32_t parent = s.member->membership().slot();
  const pid_t pid = handlers ? ::fork() : static_cast<pid_t>(::syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
  if (pid == 0) {
    ::alarm(60);
    if (!handlers) {
      // Its first operation takes a lease of its own.
      auto view = s.member->allocate(kSmallBytes, false);
      if (view) {
        (void)s.member->issue(view->block);
        s.member->release(view->block, Mode::kReadWrite);
      }
    }
    failpoint::disarm();
    for (const Held& held : s.held) {
      if (held.seed == kMaking) continue;  // let go of by the handlers
      if (!intact(held)) s.wrong("the child of a fork sees other data in block %u", held.block);
      const uint32_t slot = s.member->membership().slot();
      const uint64_t bits = s.member->arena().ledger(slot, held.block / 64).load();
      if (slot != parent && (bits >> (held.block % 64) & 1) == 0)
        s.wrong("the child of a fork holds block %u only as long as its parent does", held.block);
      // What came in a message is this process's own, and nobody else sees what it writes. (A fault may keep it shared.)
      if (held.seed == here.board->inbox[1].seed && here.run != Run::kFail) std::memset(held.data, 1, 4096);
      s.member->release(held.block, held.mode);
    }
    ::_exit(s.fine() ? 0 : 1);
  }
  failpoint::disarm();
  if (pid < 0) return Status::system("fork", "", errno);
  const int status = wait_for(pid);
  const bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && here.run == Run::kKill;
  if (status != 0 && !killed) s.wrong("the child of a fork ended with status %d", status);
  return {};
}

void before_fork(Scene& s) {
  s.adopt();
  s.hold(kSmallBytes);
  s.hold(kLargeBytes, true);
  s.receive(here.board->inbox[1], Mode::kReadWrite, true);
  s.receive(here.board->inbox[0]);
}

void before_fork_making(Scene& s) {
  before_fork(s);
  // Another thread is filling a message: the child does not keep it.
  auto made = s.member->allocate(kSmallBytes, false, true);
  if (!made) return s.wrong("allocate: %s", made.status().what().c_str());
  s.keep(*made, 0, kMaking);
}

void chunks_of_smalls(Scene& s, int chunks) {
  for (int i = 0; i < chunks * 3; ++i) s.hold(uint64_t{500} << 10);
  s.release_all();
}

Status reap(Scene& s) {
  (void)s.member->reap();
  return {};
}

void holding(Scene& v) {
  v.hold(kSmallBytes);
  v.hold(kLargeBytes);
  (void)v.member->issue(v.hold(9000).block);
}

Status put(pool::Queue& queue, uint64_t bytes) {
  auto message = queue.reserve(bytes);
  if (!message) return std::move(message.status());
  std::memset(message->data, 5, bytes);
  auto done = queue.publish(*message);
  if (!done) {
    queue.cancel(*message);
    return std::move(done.status());
  }
  return Status();
}

Status take(Scene& s, pool::Queue& queue) {
  auto message = queue.take();
  if (!message) return std::move(message.status());
  if (!*message) return Status();
  if ((*message)->data[(*message)->length - 1] != std::byte{5}) s.wrong("a message arrived with other data");
  queue.finish(**message);
  (void)queue.task_done();
  return Status();
}

// At the end of a queue's first segment, so that the second is made of it once it is drained.
std::unique_ptr<pool::Queue> worn_queue(Scene& s) {
  auto made = pool::Queue::create(*s.member, 40);
  if (!made) {
    s.wrong("queue: %s", made.status().what().c_str());
    return nullptr;
  }
  for (int i = 0; i < 255; ++i) {
    (void)put(**made, 64);
    (void)take(s, **made);
  }
  return made.take();
}

std::vector<Operation> make() {
  std::vector<Operation> all;
  const auto nothing = [](Scene&) {};
  const auto add = [&](const char* name, uint32_t flags, std::function<void(Scene&)> prepare,
                       std::function<Status(Scene&)> act) {
    all.push_back({name, flags, std::move(prepare), std::move(act)});
  };

  // -- join, leave
  add("join", kNoMember, nothing, [](Scene& s) { return s.try_join(); });
  add(
      "join_beside_a_dead", kNoMember, [](Scene& s) { s.victim(holding); }, [](Scene& s) { return s.try_join(); });
  add("join_a_slot_being_taken_back", kNoMember | kParked, nothing, [](Scene& s) {
    // The driver's lease announces, as a reaper would that has been asleep, just after the joiner has looked for that.
    here.hook = [](const char* name) {
      if (std::strcmp(name, "os.lock") != 0) return;
      here.hook = nullptr;
      uint32_t slot = 0;
      while (driver->arena().lease(slot).word.load() != pool::kLeaseFree) ++slot;
      driver->arena().lease(driver->membership().slot()).reaping.store(slot + 1);
    };
    return s.try_join();
  });
  add(
      "join_when_all_are_taken", kNoMember | kParked | kOnlyAlone | kLong,
      [](Scene& s) {
        s.victim(holding);
        // All other leases live, by one description that holds all their locks; they end with this process.
        pool::Arena& arena = driver->arena();
        auto life = os::reopen(s.control_fd);
        if (!life) return s.wrong("reopen: %s", life.status().what().c_str());
        const int fd = ::fcntl(life->get(), F_DUPFD_CLOEXEC, 200);
        for (uint32_t slot = 0; slot < pool::kMaxLeases; ++slot) {
          if (arena.lease(slot).word.load() != pool::kLeaseFree) continue;
          if (auto locked = os::try_lock(fd, slot); !locked || !*locked)
            return s.wrong("lease %u can't be locked", slot);
          arena.header().slots_used.store(std::max(arena.header().slots_used.load(), slot + 1));
          arena.lease(slot).word.store(pool::lease_word(arena.header().next_incarnation.fetch_add(1)));
        }
      },
      [](Scene& s) {
        Status joined = s.try_join();
        // While this one slept others may have taken the dead one back, and so the last lease that was to be had.
        if (here.run == Run::kStop && joined.code() == Code::kNoSlot) {
          for (uint32_t slot = 2; slot < pool::kMaxLeases; ++slot)
            driver->arena().lease(slot).word.store(pool::kLeaseFree);
          return Status();
        }
        return joined;
      });
  add("create", kNoMember, nothing, [](Scene&) {
    pool::Limits limits;
    limits.limit = pool::kChunk;
    auto made = Member::create(1, limits);
    return made ? Status() : std::move(made.status());
  });
  add("create_prefaulted", kNoMember, nothing, [](Scene&) {
    pool::Limits limits;
    limits.limit = pool::kChunk;
    auto pages = pool::parse_pages("never", true, "interleave");
    if (!pages) return std::move(pages.status());
    limits.pages = pages.take();
    auto made = Member::create(1, limits);
    // Where containers may not say so, the rest of it.
    limits.pages.numa = {};
    if (made.code() == Code::kUnsupported) made = Member::create(1, limits);
    return made ? Status() : std::move(made.status());
  });
  add(
      "leave", 0,
      [](Scene& s) {
        s.hold(kSmallBytes);
        s.release_all();
      },
      [](Scene& s) {
        s.own.reset();
        s.member = nullptr;
        inherited_lives.clear();
        return Status();
      });
  add(
      "leave_holding", 0, [](Scene& s) { holding(s); },
      [](Scene& s) {
        s.held.clear();
        s.own.reset();
        s.member = nullptr;
        inherited_lives.clear();
        return Status();
      });

  // -- allocate, small
  add(
      "small_cached", 0,
      [](Scene& s) {
        s.hold(kSmallBytes);
        last(s);
      },
      [](Scene& s) { return allocate(s, kSmallBytes); });
  add(
      "small_from_a_chunk", 0, [](Scene& s) { s.hold(kSmallBytes); }, [](Scene& s) { return allocate(s, 70000); });
  add(
      "small_whole_pages", 0, [](Scene& s) { s.hold(kSmallBytes); }, [](Scene& s) { return allocate(s, 30000, true); });
  add(
      "small_fresh_chunk", 0, [](Scene& s) { (void)s.member->trim(0); },
      [](Scene& s) { return allocate(s, kSmallBytes); });
  add(
      "small_idle_chunk", 0,
      [](Scene& s) {
        s.hold(kLargeBytes);
        last(s);
      },
      [](Scene& s) { return allocate(s, kSmallBytes); });
  add("small_adopted_orphan", 0, inherit_from_victim, [](Scene& s) { return allocate(s, kSmallBytes); });
  add(
      "small_after_a_hint", 0,
      [](Scene& s) {
        const Held block = s.hold(kSmallBytes);
        auto handle = s.member->issue(block.block);
        if (!handle) return s.wrong("issue: %s", handle.status().what().c_str());
        last(s);
        s.helper([&](Scene& h) {
          auto view = h.member->redeem(*handle, Mode::kReadWrite);
          if (!view) return h.wrong("redeem: %s", view.status().what().c_str());
          h.member->release(view->block, Mode::kReadWrite);
        });
      },
      [](Scene& s) { return allocate(s, kSmallBytes); });
  add(
      "small_at_the_limit", kMayFill, [](Scene& s) { s.press(0); }, [](Scene& s) { return allocate(s, kSmallBytes); });
  add(
      "small_in_the_making", 0, [](Scene& s) { s.hold(kSmallBytes); },
      [](Scene& s) {
        auto view = s.member->allocate(20000, false, true);
        if (!view) return std::move(view.status());
        s.member->release_made(view->block);
        return Status();
      });

  // -- allocate, large
  add(
      "large_idle_run", 0,
      [](Scene& s) {
        s.hold(kLargeBytes);
        last(s);
      },
      [](Scene& s) { return allocate(s, kLargeBytes); });
  add(
      "large_growth", 0, [](Scene& s) { (void)s.member->trim(0); }, [](Scene& s) { return allocate(s, kLargeBytes); });
  add("large_three_chunks", 0, nothing, [](Scene& s) { return allocate(s, kRunBytes); });
  add(
      "large_beside_a_dead", 0,
      [](Scene& s) {
        (void)s.member->trim(0);
        s.victim(holding);
      },
      [](Scene& s) { return allocate(s, kRunBytes); });
  add(
      "large_after_taking_empties", kMayFill | kEmptyChunk, [](Scene& s) { s.press(0); },
      [](Scene& s) { return allocate(s, kLargeBytes); });
  add(
      "large_after_own_empties", kMayFill,
      [](Scene& s) {
        chunks_of_smalls(s, 1);
        s.press(0);
      },
      [](Scene& s) { return allocate(s, kLargeBytes); });
  add(
      "large_of_a_part_of_a_chunk", kMayFill,
      [](Scene& s) {
        s.hold(pool::kChunk);
        s.release_all();
        s.press(pool::kChunk);
        pool::Header& header = s.member->arena().header();
        header.warm.store(header.limit.load() - pool::kPage);  // less than all of it
      },
      [](Scene& s) { return allocate(s, uint64_t{3} << 18); });
  add(
      "large_after_trimming", kMayFill,
      [](Scene& s) {
        s.hold(kLargeBytes);
        s.hold(kSmallBytes);
        s.hold(kLargeBytes);
        s.release_all();
        s.press(uint64_t{400} * pool::kPage);
      },
      [](Scene& s) { return allocate(s, uint64_t{5} << 19); });
  add(
      "large_from_tickets_of_the_dead", kMayFill,
      [](Scene& s) {
        s.victim([](Scene& v) { (void)v.member->issue(v.hold(kLargeBytes).block); });
        (void)s.member->reap();
        s.press(0);
      },
      [](Scene& s) { return allocate(s, kLargeBytes); });
  add(
      "large_from_old_tickets", kMayFill,
      [](Scene& s) {
        for (int i = 0; i < 2; ++i) {
          (void)s.member->issue(s.hold(kLargeBytes).block);
          last(s);
        }
        s.member->set_ticket_age(0);
        s.press(0);
      },
      [](Scene& s) { return allocate(s, kLargeBytes); });
  add(
      "large_no_room", kMayFill, [](Scene& s) { s.press(0); },
      [](Scene& s) {
        auto view = s.member->allocate(uint64_t{12} << 20, false);
        if (view) s.wrong("twelve MiB were allocated over the limit");
        return Status();
      });

  // -- queues
  add("queue_life", 0, nothing, [](Scene& s) {
    auto made = pool::Queue::create(*s.member, 4);
    if (!made) return std::move(made.status());
    pool::Queue& queue = **made;
    queue.wait(pool::Queue::For::kMessage, 5000);
    Status done = put(queue, 700);
    if (done) done = put(queue, 30000);
    if (done) done = take(s, queue);
    if (done) done = take(s, queue);
    if (done) done = put(queue, 30000);  // unreceived
    while (done && !queue.full()) done = put(queue, 64);
    auto late = queue.reserve(100);
    if (late) {
      auto sent = queue.publish(*late);
      if (sent && !*sent) queue.wait_for_room(*late, 5000);
      queue.cancel(*late);
    }
    queue.set_flag(true);
    return done;
  });
  static std::unique_ptr<pool::Queue> worn;
  add(
      "queue_next_segment", 0, [](Scene& s) { worn = worn_queue(s); },
      [](Scene& s) {
        if (!worn) return Status();
        Status done = put(*worn, 64);
        if (done) done = take(s, *worn);
        for (int i = 0; done && i < 2; ++i) done = put(*worn, 64);
        if (done) done = take(s, *worn);
        worn.reset();
        return done;
      });
  // A dead process has taken a message and was writing another; what that leaves is given back.
  add(
      "queue_salvage", 0,
      [](Scene& s) {
        worn = worn_queue(s);
        static pool::Handle handle;
        handle = *worn->handle();
        if (!put(*worn, 700) || !put(*worn, 30000)) s.wrong("two messages do not fit");
        s.victim([](Scene& v) {
          auto mine = pool::Queue::open(*v.member, handle);
          if (!mine || !(*mine)->take() || !put(**mine, 900) || !(*mine)->reserve(30000)) return;
          (void)mine->release();
        });
        (void)s.member->reap();
      },
      [](Scene& s) {
        Status done = take(s, *worn);
        worn->salvage();
        if (done) done = take(s, *worn);
        worn->close_parcel();
        worn.reset();
        return done;
      });
  add("event_fd", 0, nothing, [](Scene&) {
    auto made = os::create_event_fd();
    return made ? Status() : std::move(made.status());
  });

  // -- receive
  add("redeem_small", kInbox, nothing, [](Scene& s) { return redeem(s, here.board->inbox[0]); });
  add("redeem_large", kInbox, nothing, [](Scene& s) { return redeem(s, here.board->inbox[1]); });
  add("redeem_read_only", kInbox, nothing, [](Scene& s) { return redeem(s, here.board->inbox[0], Mode::kRead); });
  add("redeem_copy_on_write", kInbox, nothing,
      [](Scene& s) { return redeem(s, here.board->inbox[1], Mode::kCopyOnWrite); });
  add("redeem_the_only_hold", kGift, nothing, [](Scene& s) { return redeem(s, here.board->gift); });
  add("redeem_the_only_hold_large", kLargeGift, nothing, [](Scene& s) { return redeem(s, here.board->gift); });
  add(
      "redeem_twice", kInbox, [](Scene& s) { s.receive(here.board->inbox[0]); },
      [](Scene& s) { return redeem(s, here.board->inbox[0]); });
  add("redeem_used_up", kInbox | kUsedUp, nothing, [](Scene& s) { return redeem(s, here.board->inbox[0]); });
  add("redeem_stale", kGone, nothing, [](Scene& s) {
    auto view = s.member->redeem(here.board->gone.handle, Mode::kReadWrite);
    if (view) s.wrong("a stale handle gave a block");
    return Status();
  });
  add(
      "redeem_own", 0, [](Scene& s) { s.hold(kSmallBytes); },
      [](Scene& s) {
        auto handle = s.member->issue(s.held[0].block);
        if (!handle) return std::move(handle.status());
        auto view = s.member->redeem(*handle, Mode::kReadWrite);
        if (!view) return std::move(view.status());
        s.keep(*view, s.held[0].bytes, s.held[0].seed);
        return Status();
      });

  // -- hand over
  add(
      "issue_small", 0, [](Scene& s) { s.hold(kSmallBytes); }, [](Scene& s) { return s.post(s.held[0]); });
  add(
      "issue_large", 0, [](Scene& s) { s.hold(kLargeBytes); }, [](Scene& s) { return s.post(s.held[0]); });
  add(
      "issue_and_release", 0,
      [](Scene& s) {
        s.hold(kSmallBytes);
        s.hold(kLargeBytes);
      },
      [](Scene& s) {
        Status first = s.post(s.held[0]);
        Status second = s.post(s.held[1]);
        s.release_all();
        return first ? std::move(second) : std::move(first);
      });

  // -- release
  const auto release = [](Scene& s) {
    last(s);
    return Status();
  };
  add(
      "release_small", 0, [](Scene& s) { s.hold(kSmallBytes); }, release);
  add(
      "release_small_uncached", 0, [](Scene& s) { s.hold(100000); }, release);
  add(
      "release_shared", kInbox, [](Scene& s) { s.receive(here.board->inbox[0]); }, release);
  add(
      "release_of_another_owner", kGift, [](Scene& s) { s.receive(here.board->gift); }, release);
  add(
      "release_run", 0, [](Scene& s) { s.hold(kRunBytes); }, release);
  add(
      "release_run_of_another", kLargeGift, [](Scene& s) { s.receive(here.board->gift); }, release);
  add("release_last_of_an_orphan", 0, inherit_from_victim, release);
  add(
      "release_copy_on_write", kInbox,
      [](Scene& s) {
        s.receive(here.board->inbox[1], Mode::kCopyOnWrite);
        std::memset(s.held[0].data, 0, 5000);  // the process's own copy
        s.held[0].bytes = 0;
      },
      release);
  add(
      "release_after_a_fork", kInbox | kForks,
      [](Scene& s) {
        s.adopt();
        s.receive(here.board->inbox[1], Mode::kReadWrite, true);
        if (const pid_t pid = ::fork(); pid == 0) {
          ::_exit(0);
        } else {
          (void)wait_for(pid);
        }
        std::memset(s.held[0].data, 3, 8192);  // no one else's
        s.held[0].bytes = 0;
      },
      release);
  add(
      "release_leaves_many_empty", kOnlyAlone | kRaisesLimit,
      [](Scene& s) {
        s.member->arena().header().limit.store(kLimit * 3);
        for (int i = 0; i < 9 * 3; ++i) s.hold(uint64_t{500} << 10);
        while (s.held.size() > 3) last(s);
      },
      [](Scene& s) {
        s.release_all();
        return Status();
      });
  add(
      "release_overruns_the_hints", kManyGifts | kOnlyAlone,
      [](Scene& s) {
        for (uint32_t i = 0; i < kMany; ++i) {
          auto view = s.member->redeem(here.board->many[i], Mode::kReadWrite);
          if (!view) return s.wrong("redeem: %s", view.status().what().c_str());
          s.keep(*view, 0, 0);
        }
        while (s.held.size() > 8) last(s);
      },
      [](Scene& s) {
        s.release_all();
        return Status();
      });

  // -- fork
  add("fork", kInbox | kForks, before_fork_making, [](Scene& s) { return forked(s, true, true, true); });
  add("fork_parent", kInbox | kForks, before_fork, [](Scene& s) { return forked(s, true, false, true); });
  add("fork_child", kInbox | kForks, before_fork_making, [](Scene& s) { return forked(s, false, true, true); });
  add(
      "fork_without_handlers", kForks,
      [](Scene& s) {
        s.hold(kSmallBytes);
        s.hold(kLargeBytes);
      },
      [](Scene& s) { return forked(s, true, true, false); });

  // -- reap
  add(
      "reap_holding", kReaps, [](Scene& s) { s.victim(holding); }, reap);
  struct At {
    const char* name;
    const char* point;
    std::function<void(Scene&)> work;
  };
  const auto allocates = [](Scene& v) { v.hold(kSmallBytes); };
  const auto allocates_large = [](Scene& v) { v.hold(kRunBytes); };
  const auto issues = [](Scene& v) { (void)v.member->issue(v.hold(kSmallBytes).block); };
  const auto releases = [](Scene& v) {
    v.hold(kSmallBytes);
    v.release_all();
  };
  const auto releases_large = [](Scene& v) {
    v.hold(kRunBytes);
    v.release_all();
  };
  const auto receives = [](Scene& v) { v.receive(here.board->inbox[0]); };
  const At points[] = {
      {"reap_allocating", "allocate.live", allocates},
      {"reap_backing", "claim_small.taken", allocates},
      {"reap_claiming", "claim_run.chunk", allocates_large},
      {"reap_claimed", "claim_run.backed", allocates_large},
      {"reap_issuing", "issue.counted", issues},
      {"reap_issued", "issue.out", issues},
      {"reap_attaching", "attach.counted", receives},
      {"reap_redeeming", "redeem.cleared", receives},
      {"reap_dropping", "drop.bit_cleared", releases},
      {"reap_freeing_a_run", "release_run.idle", releases_large},
      {"reap_counted_down", "ledger.counted_down", releases_large},
      {"reap_trimming", "trim.claimed",
       [](Scene& v) {
         v.hold(kLargeBytes);
         v.release_all();
         (void)v.member->trim(0);
       }},
  };
  for (const At& at : points) {
    add(
        at.name, kReaps | kInbox, [at](Scene& s) { s.victim(at.work, at.point); }, reap);
  }
  add(
      "reap_taking", kReaps | kEmptyChunk | kParked,
      [](Scene& s) { s.victim([](Scene& v) { (void)v.member->trim(0); }, "take_empty.announced"); }, reap);
  add(
      "reap_a_reaper", kReaps | kParked,
      [](Scene& s) {
        s.victim(
            [](Scene& v) {
              failpoint::disarm();
              v.victim(holding);
              failpoint::Plan plan;
              plan.action = failpoint::Action::kKill;
              plan.only = "reap.ledger_done";
              failpoint::arm(plan);
              (void)v.member->reap();
            },
            "reap.ledger_done");
      },
      reap);

  // -- the rest
  const auto trim = [](Scene& s) {
    (void)s.member->trim(0);
    return Status();
  };
  add(
      "trim_idle", 0,
      [](Scene& s) {
        s.hold(kLargeBytes);
        last(s);
      },
      trim);
  add(
      "trim_own_empty_chunk", 0,
      [](Scene& s) {
        s.hold(kSmallBytes);
        last(s);
      },
      trim);
  add("trim_empty_chunk_of_another", kEmptyChunk, nothing, trim);
  add(
      "trim_some", 0,
      [](Scene& s) {
        s.hold(kLargeBytes);
        s.hold(kLargeBytes);
        s.release_all();
      },
      [](Scene& s) {
        (void)s.member->trim(kLargeBytes);
        return Status();
      });
  add(
      "janitor", kParked,
      [](Scene& s) {
        s.hold(kLargeBytes);
        s.member->arena().header().warm.store(0);
      },
      [](Scene& s) {
        last(s);
        for (int i = 0; i < 300; ++i) {
          uint64_t idle = 0;
          for (uint32_t c = 0; c < s.member->arena().chunks_used(); ++c)
            idle +=
                pool::ChunkValue::of(s.member->arena().chunk(c).value.load()).state == pool::ChunkState::kIdle ? 1 : 0;
          if (idle == 0 && static_cast<int64_t>(s.member->arena().header().idle_estimate.load()) == 0) break;
          ::usleep(100);
        }
        s.own.reset();  // its thread has ended when the last point is passed
        s.member = nullptr;
        inherited_lives.clear();
        return Status();
      });
  add(
      "stats", 0, [](Scene& s) { holding(s); },
      [](Scene& s) {
        if (s.member->stats().blocks < s.held.size()) s.wrong("stats() has lost a block");
        return Status();
      });
  add(
      "check", 0, [](Scene& s) { holding(s); },
      [](Scene& s) {
        const pool::CheckReport report = pool::check(s.member->arena());
        if (!report.ok()) s.wrong("the checker: %s", report.first().c_str());
        return Status();
      });
  add(
      "look_at_a_copy", kInbox, [](Scene& s) { s.receive(here.board->inbox[1], Mode::kCopyOnWrite); },
      [](Scene& s) {
        const auto found = s.member->find(s.held[0].data + 5000);
        if (!found || found->block != s.held[0].block) {
          s.wrong("the block of an address was not found");
          return Status();
        }
        const bool modified = s.member->modified(*found, s.held[0].data, s.held[0].data + s.held[0].bytes);
        if (modified && here.run != Run::kFail) s.wrong("an unwritten copy counts as written");
        auto view = s.member->view(found->block, Mode::kRead);
        if (!view) return std::move(view.status());
        s.keep(*view, s.held[0].bytes, s.held[0].seed, Mode::kRead);
        return Status();
      });
  return all;
}

}  // namespace

// The store's are torchshm_store_points'.
const Subject& subject() {
  static const auto* pool = new Subject{
      .name = "points",
      .program = "torchshm_points",
      .counts =
          [](std::string_view room, std::string_view file, std::string_view point) {
            // Of files on a disk: tests/cpp/spill_file_test.cc, spill_death_test.cc and store_file_test.cc go through all of them.
            const bool on_disk = file == "file.cc" || file == "directory.cc" || file == "mapped_file.cc" ||
                                 point.substr(0, 8) == "reserve.";
            return (room == "base" || room == "os" || room == "pool") && !on_disk && file != "socket.cc" &&
                   point != "os.open_memfd";
          },
  };
  return *pool;
}

const std::vector<Operation>& operations() {
  static const auto* all = new std::vector<Operation>(make());
  return *all;
}

}  // namespace torchshm::torture
