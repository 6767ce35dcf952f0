#include "step_operations.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "os/memfd.h"

namespace torchshm::torture {

using pool::BlockValue;
using pool::Handle;
using pool::Member;
using pool::Mode;
using pool::TicketValue;

namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

[[noreturn]] void stop(const char* what, const std::string& why) {
  std::fprintf(stderr, "step: %s: %s\n", what, why.c_str());
  std::exit(2);
}

std::unique_ptr<Member> member_of(Member& other) {
  auto member =
      Member::attach(os::duplicate(other.arena().data_fd()).take(), os::duplicate(other.arena().control_fd()).take());
  if (!member) stop("attach", member.status().what());
  return member.take();
}

void drop(Scene& s, uint32_t block) {
  if (block != kNone) s.self->release(block, Mode::kReadWrite);
}

// kNone where there is no room, as random combinations may have it.
uint32_t make(Scene& s, uint64_t bytes, bool whole_pages = false) {
  auto view = s.self->allocate(bytes, whole_pages);
  if (!view) return kNone;
  std::memset(view->data, 0x11, bytes);
  return view->block;
}

// Chunks that this process has had, and a look at the machine's memory that is still fresh.
void warm(Scene& s) { drop(s, make(s, 3 * kMiB)); }

void take(Scene& s, Mode mode, bool exclusive = false) {
  auto view = s.self->redeem(s.handle, mode, exclusive);
  s.block = view ? view->block : kNone;
}

// A survivor's chunk in which nothing is live any more, though it is still the survivor's.
void empty_chunk(Scene& s) {
  uint32_t filled[4];
  int n = 0;
  for (uint32_t& block : filled) {
    auto view = s.survivor->allocate(500 * 1024, false);
    if (!view) break;
    block = view->block;
    ++n;
  }
  while (n > 0) s.survivor->release(filled[--n], Mode::kReadWrite);
}

void leave_message(Scene& s, uint64_t bytes) {
  const uint32_t block = make(s, bytes);
  if (block == kNone) return;
  (void)s.self->issue(block);
  drop(s, block);
}

void varied_life(Scene& s) {
  (void)make(s, 50000);
  (void)make(s, 3 * kMiB);
  const auto messages = s.messages();
  if (!messages.empty()) (void)s.self->redeem(messages[0], Mode::kReadWrite);
  leave_message(s, 9000);
}

void fork_and_wait(Scene& s, bool parent_waits) {
  constexpr auto seen = 0x11;
  const std::byte* data = nullptr;
  if (const auto extent = s.self->arena().extent(s.block)) data = s.self->arena().data() + extent->offset;
  if (::fork() != 0) {
    while (parent_waits) ::pause();
    return;
  }
  if (parent_waits) return;
  // The child that survives its parent: what it inherited is whole, it can work, and what it drops goes.
  bool good =
      data != nullptr && static_cast<unsigned char>(data[0]) == seen && static_cast<unsigned char>(data[9999]) == seen;
  (void)s.self->reap();
  if (auto view = s.self->allocate(5000, false)) drop(s, view->block);
  good = good && s.self->issue(s.block).ok();
  drop(s, s.block);
  ::_exit(good ? 0 : 1);
}

}  // namespace

void live_and_die(Scene& scene, void (*life)(Scene&)) {
  std::fflush(nullptr);
  const pid_t pid = ::fork();
  if (pid == 0) {
    (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
    scene.join();
    life(scene);
    (void)::raise(SIGKILL);
  }
  (void)::waitpid(pid, nullptr, 0);
}

Scene::Scene(uint64_t limit) {
  pool::Limits limits;
  limits.limit = limit;
  limits.warm = limit;  // no janitor: its thread would step into the operation
  auto made = Member::create(1, limits);
  if (!made) stop("create", made.status().what());
  survivor = made.take();
  if (!hold(20000, true)) stop("hold", "no room");
  auto out = survivor->allocate(kLetterBytes, false);
  std::memset(out->data, kLetter, kLetterBytes);
  letter = *survivor->issue(out->block);
  survivor->release(out->block, Mode::kReadWrite);
  auto gone = survivor->allocate(6000, false);
  stale = *survivor->issue(gone->block);
  (void)survivor->redeem(stale, Mode::kReadWrite);
  survivor->release(gone->block, Mode::kReadWrite);
  survivor->release(gone->block, Mode::kReadWrite);
}

Scene::~Scene() = default;

bool Scene::hold(uint64_t bytes, bool whole_pages) {
  auto view = survivor->allocate(bytes, whole_pages);
  if (!view) return false;
  const auto pattern = static_cast<unsigned char>(0x21 + held.size());
  std::memset(view->data, pattern, bytes);
  held.push_back({view->block, Mode::kReadWrite, view->data, bytes, pattern});
  return true;
}

std::optional<Handle> Scene::send(uint64_t bytes, bool whole_pages) {
  auto view = survivor->allocate(bytes, whole_pages);
  if (!view) return std::nullopt;
  std::memset(view->data, 0x11, bytes);
  auto out = survivor->issue(view->block);
  survivor->release(view->block, Mode::kReadWrite);
  if (!out) return std::nullopt;
  return *out;
}

void Scene::let_go() {
  survivor->release(held.back().block, held.back().mode);
  held.pop_back();
}

std::vector<Handle> Scene::messages() const {
  std::vector<Handle> out;
  const pool::Arena& arena = survivor->arena();
  for (uint32_t i = 0, used = arena.tickets_used(); i < used; ++i) {
    const TicketValue ticket = TicketValue::of(arena.ticket(i).value.load());
    if (ticket.sender == 0 || ticket.of_queue() || i == letter.ticket || ticket.block >= arena.pages()) continue;
    const BlockValue block = BlockValue::of(arena.block(ticket.block).value.load());
    out.push_back({survivor->pool_id(), block.generation, ticket.block, i, ticket.nonce});
  }
  return out;
}

void Scene::join() { self = pool::adopt(member_of(*survivor)); }

namespace {

std::vector<Operation> pool_operations() {
  return {
      // ---- allocate
      {.name = "allocate small, cached",
       .family = "allocate",
       .prepare = [](Scene& s) { (void)make(s, 7000), drop(s, make(s, 5000)); },
       .act = [](Scene& s) { (void)s.self->allocate(5000, false); }},
      {.name = "allocate small, from the chunk",
       .family = "allocate",
       .prepare = [](Scene& s) { (void)make(s, 7000); },
       .act = [](Scene& s) { (void)s.self->allocate(9000, false); }},
      {.name = "allocate small, whole pages, in the making",
       .family = "allocate",
       .prepare = [](Scene& s) { (void)make(s, 7000); },
       .act = [](Scene& s) { (void)s.self->allocate(60000, true, true); }},
      {.name = "allocate small, freed by another",
       .family = "allocate",
       .prepare = [](Scene& s) { (void)make(s, 7000), leave_message(s, 9000); },
       .between =
           [](Scene& s) {
             const auto messages = s.messages();
             if (messages.empty()) return;
             if (auto view = s.survivor->redeem(messages[0], Mode::kReadWrite))
               s.survivor->release(view->block, Mode::kReadWrite);
           },
       .act = [](Scene& s) { (void)s.self->allocate(9000, false); }},
      {.name = "allocate small, an idle chunk",
       .family = "allocate",
       .prepare = warm,
       .act = [](Scene& s) { (void)s.self->allocate(9000, false); }},
      {.name = "allocate small, a hole",
       .family = "allocate",
       .act = [](Scene& s) { (void)s.self->allocate(9000, false); }},
      {.name = "allocate small, an orphan",
       .family = "allocate",
       .before =
           [](Scene& s) {
             live_and_die(s, [](Scene& v) { leave_message(v, 50000); });
             (void)s.survivor->reap();
           },
       .act = [](Scene& s) { (void)s.self->allocate(9000, false); }},
      {.name = "allocate a run, idle chunks",
       .family = "allocate",
       .prepare = warm,
       .act = [](Scene& s) { (void)s.self->allocate(3 * kMiB, false); }},
      {.name = "allocate a run, holes",
       .family = "allocate",
       .act = [](Scene& s) { (void)s.self->allocate(3 * kMiB, false); }},
      {.name = "allocate a run, idle chunks and a hole",
       .family = "allocate",
       .prepare = warm,
       .act = [](Scene& s) { (void)s.self->allocate(5 * kMiB, false); }},
      {.name = "allocate at the limit, from messages",
       .family = "allocate",
       .before = [](Scene& s) { (void)s.send(5 * kMiB), s.survivor->set_ticket_age(0); },
       .act = [](Scene& s) { (void)s.self->allocate(3 * kMiB, false); }},
      {.name = "allocate at the limit, from a dead sender's message",
       .family = "allocate",
       .before =
           [](Scene& s) {
             live_and_die(s, [](Scene& v) { leave_message(v, 5 * kMiB); });
             (void)s.survivor->reap();
           },
       .act = [](Scene& s) { (void)s.self->allocate(3 * kMiB, false); }},
      {.name = "allocate at the limit, from the dead",
       .family = "allocate",
       .between = [](Scene& s) { live_and_die(s, [](Scene& v) { (void)make(v, 5 * kMiB); }); },
       .act = [](Scene& s) { (void)s.self->allocate(3 * kMiB, false); }},
      {.name = "allocate at the limit, another's empty chunk",
       .family = "allocate",
       .before = [](Scene& s) { empty_chunk(s), (void)s.hold(3 * kMiB); },
       .act = [](Scene& s) { (void)s.self->allocate(9000, false); }},
      {.name = "allocate at the limit, refused",
       .family = "allocate",
       .before = [](Scene& s) { (void)s.hold(5 * kMiB); },
       .act = [](Scene& s) { (void)s.self->allocate(3 * kMiB, false); }},
      // ---- hold
      {.name = "hold, once more",
       .family = "hold",
       .prepare = [](Scene& s) { s.block = make(s, 9000); },
       .act =
           [](Scene& s) {
             if (s.block != kNone) s.self->retain(s.block, Mode::kReadWrite);
           }},
      {.name = "hold, another view",
       .family = "hold",
       .prepare = [](Scene& s) { s.block = make(s, 60000, true); },
       .act =
           [](Scene& s) {
             if (s.block != kNone) (void)s.self->view(s.block, Mode::kCopyOnWrite);
           }},
      {.name =
           "hold, what a raw fork inherited",  // runs no handlers: the first operation takes a lease and holds all of it again
       .family = "hold",
       .before = [](Scene& s) { (void)s.hold(9000), (void)s.hold(kMiB); },
       .act = [](Scene& s) { (void)s.survivor->issue(s.held[0].block); },
       .joins = false},
      // ---- release
      {.name = "release small",
       .family = "release",
       .prepare = [](Scene& s) { (void)make(s, 7000), s.block = make(s, 5000); },
       .act = [](Scene& s) { drop(s, s.block); }},
      {.name = "release small, just made",
       .family = "release",
       .prepare =
           [](Scene& s) {
             if (auto view = s.self->allocate(5000, false, true)) s.block = view->block;
           },
       .act =
           [](Scene& s) {
             if (s.block != kNone) s.self->release_made(s.block);
           }},
      {.name = "release a run",
       .family = "release",
       .prepare = [](Scene& s) { s.block = make(s, 3 * kMiB); },
       .act = [](Scene& s) { drop(s, s.block); }},
      {.name = "release small, another holds it too",
       .family = "release",
       .before = [](Scene& s) { s.handle = s.survivor->issue(s.held[0].block).take(); },
       .prepare = [](Scene& s) { take(s, Mode::kReadWrite); },
       .act = [](Scene& s) { drop(s, s.block); }},
      {.name = "release small, the last of another's chunk",
       .family = "release",
       .before = [](Scene& s) { s.handle = s.send(50000).value_or(s.stale); },
       .prepare = [](Scene& s) { take(s, Mode::kReadWrite); },
       .act = [](Scene& s) { drop(s, s.block); }},
      {.name = "release small, an orphan's last",
       .family = "release",
       .before =
           [](Scene& s) {
             live_and_die(s, [](Scene& v) { leave_message(v, 50000); });
             (void)s.survivor->reap();
             if (const auto messages = s.messages(); !messages.empty()) s.handle = messages[0];
           },
       .prepare = [](Scene& s) { take(s, Mode::kReadWrite); },
       .act = [](Scene& s) { drop(s, s.block); }},
      {.name = "release a copy-on-write view",
       .family = "release",
       .before = [](Scene& s) { s.handle = s.send(64 * 1024, true).value_or(s.stale); },
       .prepare =
           [](Scene& s) {
             auto view = s.self->redeem(s.handle, Mode::kCopyOnWrite);
             if (!view) return;
             s.block = view->block;
             std::memset(view->data, 0x77, 8192);
           },
       .act =
           [](Scene& s) {
             if (s.block != kNone) s.self->release(s.block, Mode::kCopyOnWrite);
           }},
      {.name = "release, private since a fork",
       .family = "release",
       .before = [](Scene& s) { s.handle = s.send(64 * 1024, true).value_or(s.stale); },
       .prepare =
           [](Scene& s) {
             take(s, Mode::kReadWrite, true);
             if (::fork() == 0) ::_exit(0);
             (void)::wait(nullptr);
             (void)s.self->reap();
           },
       .act = [](Scene& s) { drop(s, s.block); }},
      // ---- issue
      {.name = "issue",
       .family = "issue",
       .prepare = [](Scene& s) { s.block = make(s, 5000); },
       .act =
           [](Scene& s) {
             if (s.block != kNone) (void)s.self->issue(s.block);
           }},
      {.name = "issue, a run",
       .family = "issue",
       .prepare = [](Scene& s) { s.block = make(s, 3 * kMiB); },
       .act =
           [](Scene& s) {
             if (s.block != kNone) (void)s.self->issue(s.block);
           }},
      // ---- redeem
      {.name = "redeem, the sender holds it",
       .family = "redeem",
       .before = [](Scene& s) { s.handle = s.survivor->issue(s.held[0].block).take(); },
       .act = [](Scene& s) { take(s, Mode::kReadWrite); }},
      {.name = "redeem, nobody holds it",
       .family = "redeem",
       .before = [](Scene& s) { s.handle = s.send(50000).value_or(s.stale); },
       .act = [](Scene& s) { take(s, Mode::kRead); }},
      {.name = "redeem a run, nobody holds it",
       .family = "redeem",
       .before = [](Scene& s) { s.handle = s.send(3 * kMiB).value_or(s.stale); },
       .act = [](Scene& s) { take(s, Mode::kReadWrite); }},
      {.name = "redeem, exclusive, copy-on-write",
       .family = "redeem",
       .before = [](Scene& s) { s.handle = s.send(64 * 1024, true).value_or(s.stale); },
       .act = [](Scene& s) { take(s, Mode::kCopyOnWrite, true); }},
      {.name = "redeem, a duplicate, held",
       .family = "redeem",
       .before = [](Scene& s) { s.handle = s.send(50000).value_or(s.stale); },
       .prepare = [](Scene& s) { take(s, Mode::kReadWrite); },
       .act = [](Scene& s) { take(s, Mode::kReadWrite); }},
      {.name = "redeem, a duplicate, held by the sender",
       .family = "redeem",
       .before = [](Scene& s) { s.handle = s.survivor->issue(s.held[0].block).take(); },
       .prepare = [](Scene& s) { take(s, Mode::kReadWrite), drop(s, s.block); },
       .act = [](Scene& s) { take(s, Mode::kReadWrite); }},
      {.name = "redeem, stale",
       .family = "redeem",
       .before = [](Scene& s) { s.handle = s.stale; },
       .act = [](Scene& s) { take(s, Mode::kReadWrite); }},
      {.name = "redeem, copy-on-write refused",  // held, and dropped again
       .family = "redeem",
       .before = [](Scene& s) { s.handle = s.send(50000).value_or(s.stale); },
       .act = [](Scene& s) { take(s, Mode::kCopyOnWrite); }},
      // ---- reap
      {.name = "reap one that held",
       .family = "reap",
       .before = [](Scene& s) { (void)s.send(30000); },
       .between = [](Scene& s) { live_and_die(s, varied_life); },
       .act = [](Scene& s) { (void)s.self->reap(); }},
      {.name = "reap two",
       .family = "reap",
       .between =
           [](Scene& s) {
             // Both have joined before either dies: the second would take the first back.
             live_and_die(s, [](Scene& first) {
               (void)make(first, 9000);
               const auto second = member_of(*first.survivor);
               (void)second->allocate(9000, false);
               (void)second->allocate(kMiB, false);
             });
           },
       .act = [](Scene& s) { (void)s.self->reap(); }},
      // ---- members
      {.name = "join", .family = "join", .act = [](Scene& s) { s.join(); }, .joins = false},
      {.name = "join, and take the dead back",
       .family = "join",
       .before = [](Scene& s) { live_and_die(s, varied_life); },
       .act = [](Scene& s) { s.join(); },
       .joins = false},
      {.name = "leave",
       .family = "leave",
       .prepare =
           [](Scene& s) {
             s.self = member_of(*s.survivor).release();
             (void)make(s, 9000), (void)make(s, 3 * kMiB);
           },
       .act = [](Scene& s) { delete s.self; },
       .joins = false},
      {.name = "fork, the parent",
       .family = "fork",
       .before = [](Scene& s) { s.handle = s.send(64 * 1024, true).value_or(s.stale); },
       .prepare = [](Scene& s) { take(s, Mode::kReadWrite, true), (void)make(s, kMiB), s.block = make(s, 10000); },
       .act = [](Scene& s) { fork_and_wait(s, false); }},
      {.name = "fork, the child",
       .family = "fork",
       .before = [](Scene& s) { s.handle = s.send(64 * 1024, true).value_or(s.stale); },
       .prepare =
           [](Scene& s) {
             take(s, Mode::kReadWrite, true), (void)make(s, kMiB), s.block = make(s, 10000);
             (void)s.self->allocate(9000, false, true);  // in the making: the child drops it
           },
       .act = [](Scene& s) { fork_and_wait(s, true); },
       .child = true},
      // ---- memory
      {.name = "trim",
       .family = "trim",
       .prepare = [](Scene& s) { warm(s), drop(s, make(s, 50000)); },
       .act = [](Scene& s) { (void)s.self->trim(0); }},
      {.name = "trim, another's empty chunk",  // Space::take_empty
       .family = "trim",
       .before = empty_chunk,
       .act = [](Scene& s) { (void)s.self->trim(0); }},
      {.name = "statistics", .family = "stats", .act = [](Scene& s) { (void)s.self->stats(); }},
  };
}

}  // namespace

const std::vector<Operation>& operations() {
  static const std::vector<Operation> all = [] {
    auto both = pool_operations();
    for (Operation& operation : queue_operations()) both.push_back(std::move(operation));
    return both;
  }();
  return all;
}

void random_steps(Scene& s, std::mt19937_64& random, int steps) {
  static const uint64_t sizes[] = {100, 5000, 9000, 50000, 200000, 500000, kMiB, 3 * kMiB};
  for (; steps > 0; --steps) {
    const size_t any = s.own.empty() ? 0 : random() % s.own.size();
    switch (random() % 7) {
      case 0:
      case 1:
        if (const uint32_t block = make(s, sizes[random() % 8], random() % 4 == 0); block != kNone)
          s.own.push_back(block);
        break;
      case 2:
        if (s.own.empty()) break;
        drop(s, s.own[any]);
        s.own.erase(s.own.begin() + static_cast<ptrdiff_t>(any));
        break;
      case 3:
        if (!s.own.empty()) (void)s.self->issue(s.own[any]);
        break;
      case 4: {
        const auto messages = s.messages();
        if (messages.empty()) break;
        if (auto view = s.self->redeem(messages[random() % messages.size()], Mode::kReadWrite))
          s.own.push_back(view->block);
        break;
      }
      case 5:
        (void)s.self->trim(random() % 2 == 0 ? 0 : 2 * kMiB);
        break;
      default:
        (void)s.self->reap();
        break;
    }
  }
}

}  // namespace torchshm::torture
