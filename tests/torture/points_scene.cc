#include "points_scene.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string_view>
#include <unordered_map>

#include "os/memfd.h"
#include "pool/members.h"

namespace torchshm::torture {

using pool::Member;
using pool::Mode;

Here here;
std::vector<int> inherited_lives;
Member* driver = nullptr;

// ---- points

namespace {

std::vector<std::string> read_names(const std::vector<std::string_view>& macros) {
  std::set<std::string> found;
  for (const char* room : {"base", "os", "pool", "store", "service"}) {
    for (const auto& file : std::filesystem::directory_iterator(std::string(TORCHSHM_SOURCES) + "/" + room)) {
      std::ifstream source(file.path());
      std::string line;
      while (std::getline(source, line)) {
        for (const std::string_view macro : macros) {
          for (size_t at = 0; (at = line.find(macro, at)) != std::string::npos;) {
            at += macro.size();
            const std::string name = line.substr(at, line.find('"', at) - at);
            if (subject().counts(room, file.path().filename().native(), name)) found.insert(name);
          }
        }
      }
    }
  }
  return {found.begin(), found.end()};
}

uint32_t index_of(const char* name) {
  static const auto* indices = [] {
    auto* made = new std::unordered_map<std::string_view, uint32_t>();
    for (uint32_t i = 0; i < point_names().size(); ++i) made->emplace(point_names()[i], i);
    return made;
  }();
  const auto found = indices->find(name);
  return found == indices->end() ? kMaxNames - 1 : found->second;
}

void watch(const char* name, bool acts) {
  here.totals->reached[static_cast<int>(here.run)][index_of(name)].store(1, std::memory_order_relaxed);
  // It may disarm the plan: of the two processes after a fork one is not to stop, nor to say that it does.
  if (here.hook != nullptr) here.hook(name);
  if (acts && failpoint::armed()) {
    Board& board = *here.board;
    std::strncpy(board.last[here.level], name, sizeof board.last[0] - 1);
    board.acted[here.level].store(1);
    switch (here.run) {
      case Run::kKill:
        here.totals->kills.fetch_add(1);
        break;
      case Run::kFail:
        here.totals->failures.fetch_add(1);
        break;
      case Run::kStop:
        here.totals->stops.fetch_add(1);
        board.stopped.store(::getpid());
        break;
    }
  }
}

}  // namespace

const std::vector<std::string>& point_names() {
  static const auto* names = new std::vector<std::string>(read_names({"TORCHSHM_POINT(\"", "TORCHSHM_INJECT(\""}));
  return *names;
}

const std::vector<std::string>& names_that_can_fail() {
  static const auto* names = new std::vector<std::string>(read_names({"TORCHSHM_INJECT(\""}));
  return *names;
}

failpoint::Plan plan_for(failpoint::Action action, uint64_t at) {
  (void)index_of("");
  failpoint::Plan plan;
  plan.action = action;
  plan.at = at;
  plan.watch = watch;
  return plan;
}

// ---- blocks

namespace {

uint64_t word_at(uint64_t seed, uint64_t i) { return (seed + i) * 0x9e3779b97f4a7c15; }
// Small blocks word for word, large ones eight words in a page.
uint64_t step_of(uint64_t bytes) { return bytes > 65536 ? 61 : 1; }

}  // namespace

void fill(const Held& held) {
  for (uint64_t i = 0, n = held.bytes / 8, step = step_of(held.bytes); i < n; i += step) {
    const uint64_t word = word_at(held.seed, i);
    std::memcpy(held.data + i * 8, &word, 8);
  }
}

bool intact(const Held& held) {
  for (uint64_t i = 0, n = held.bytes / 8, step = step_of(held.bytes); i < n; i += step) {
    uint64_t word = 0;
    std::memcpy(&word, held.data + i * 8, 8);
    if (word != word_at(held.seed, i)) return false;
  }
  return true;
}

// ---- processes

pid_t begin(const std::function<int()>& body) {
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  for (const int fd : inherited_lives) ::close(fd);
  inherited_lives.clear();
  failpoint::disarm();
  here.hook = nullptr;
  ::alarm(60);  // a hang ends as a failure
  ::_exit(body());
}

int wait_for(pid_t pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0) {
    if (errno != EINTR) return -1;
  }
  return status;
}

// ---- scene

void Scene::wrong(const char* format, ...) {
  fine_ = false;
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  (void)std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  say(here.board->wrong, "level %u: %s", here.level, text);
}

Status Scene::try_join() {
  auto data = os::duplicate(data_fd);
  if (!data) return std::move(data.status());
  auto control = os::duplicate(control_fd);
  if (!control) return std::move(control.status());
  auto joined = Member::attach(data.take(), control.take());
  if (!joined) return std::move(joined.status());
  own = joined.take();
  member = own.get();
  inherited_lives.push_back(member->membership().life_fd());
  return {};
}

void Scene::join() {
  if (Status joined = try_join(); !joined) wrong("join: %s", joined.what().c_str());
}

void Scene::adopt() {
  member = pool::adopt(std::move(own));
  inherited_lives.clear();  // handlers for fork see to it
}

Held& Scene::keep(const Member::View& view, uint64_t bytes, uint64_t with_seed, Mode mode) {
  held.push_back({view.block, mode, view.data, bytes, with_seed});
  return held.back();
}

Held& Scene::hold(uint64_t bytes, bool whole_pages) {
  auto view = member->allocate(bytes, whole_pages);
  if (!view) {
    if (!here.board->tolerant) wrong("allocate %lu: %s", bytes, view.status().what().c_str());
    static Held none;
    return none;
  }
  Held& kept = keep(*view, bytes, ++seed * 1000003 + static_cast<uint64_t>(::getpid()));
  fill(kept);
  return kept;
}

Held& Scene::receive(Message& message, Mode mode, bool exclusive) {
  if (&message == &here.board->gift) message.state.store(kClaimed);
  auto view = member->redeem(message.handle, mode, exclusive);
  if (!view) {
    wrong("redeem: %s", view.status().what().c_str());
    static Held none;
    return none;
  }
  Held& kept = keep(*view, message.bytes, message.seed, mode);
  if (!intact(kept)) wrong("block %u was received with other data", kept.block);
  return kept;
}

void Scene::release(size_t index) {
  if (index >= held.size()) return;
  const Held gone = held[index];
  held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
  if (!intact(gone)) wrong("block %u of %lu bytes has changed", gone.block, gone.bytes);
  if (gone.seed == kMaking) return member->release_made(gone.block);
  member->release(gone.block, gone.mode);
}

void Scene::release_all() {
  while (!held.empty()) release(held.size() - 1);
}

Status Scene::post(const Held& kept) {
  for (Message& message : here.board->street) {
    uint32_t expected = kNothing;
    if (!message.state.compare_exchange_strong(expected, kWriting)) continue;
    auto handle = member->issue(kept.block);
    if (!handle) {
      message.state.store(kNothing);
      return std::move(handle.status());
    }
    message.handle = *handle;
    message.seed = kept.seed;
    message.bytes = kept.bytes;
    message.state.store(kUp);
    return {};
  }
  auto handle = member->issue(kept.block);  // no room in the street: the message is lost
  return handle ? Status() : std::move(handle.status());
}

void Scene::victim(const std::function<void(Scene&)>& work, const char* dies_at) {
  Board& board = *here.board;
  const pid_t pid = begin([&] {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    Scene self(data_fd, control_fd);
    self.seed = seed + 100;
    self.join();
    if (!self.fine()) return 1;
    board.victim_word.store(self.member->arena().lease(self.member->membership().slot()).word.load());
    board.victim_slot.store(self.member->membership().slot() + 1);
    if (dies_at != nullptr) {
      failpoint::Plan plan;
      plan.action = failpoint::Action::kKill;
      plan.only = dies_at;
      failpoint::arm(plan);
    }
    work(self);
    if (dies_at == nullptr) std::raise(SIGKILL);
    return self.fine() ? 3 : 1;
  });
  const int status = wait_for(pid);
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
    here.totals->kills.fetch_add(1);
  } else if (WIFEXITED(status) && WEXITSTATUS(status) == 3) {
    here.totals->missed.fetch_add(1);  // the survivor came first
  } else if (!board.tolerant) {
    wrong("the victim was to die at %s and ended with status %d", dies_at == nullptr ? "the end" : dies_at, status);
  }
}

void Scene::helper(const std::function<void(Scene&)>& work) {
  const int status = wait_for(begin([&] {
    Scene self(data_fd, control_fd);
    self.seed = seed + 100;
    self.join();
    if (self.fine()) work(self);
    self.own.reset();
    return self.fine() ? 0 : 1;
  }));
  if (status != 0) wrong("a helper ended with status %d", status);
}

uint64_t Scene::committed(bool idle_too) const {
  uint64_t pages = 0;
  for (uint32_t i = 0, used = member->arena().chunks_used(); i < used; ++i) {
    const auto chunk = pool::ChunkValue::of(member->arena().chunk(i).value.load());
    if (idle_too || chunk.state != pool::ChunkState::kIdle) pages += chunk.committed;
  }
  return pages * pool::kPage;
}

void Scene::press(uint64_t room) { member->arena().header().limit.store(committed(false) + room); }

}  // namespace torchshm::torture
