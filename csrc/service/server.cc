#include "service/server.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <map>

#include "base/failpoint.h"
#include "os/futex.h"
#include "os/mapped_file.h"
#include "os/memfd.h"
#include "os/process.h"
#include "os/thread.h"
#include "pool/members.h"
#include "service/address.h"
#include "service/wire.h"
#include "store/backing.h"
#include "store/spill_file.h"

namespace torchshm::service {
namespace {

constexpr int kTidyEvery = 250;  // ms; what a death or an expiry may wait for when nothing tells of it
constexpr int kRest = 10;        // ms, after a connection that could not be taken
constexpr size_t kMostConnections = 256;
constexpr std::ptrdiff_t kMostStrangers = 16;
constexpr uint64_t kLookAhead = 50'000'000;       // ns between looks at how full memory is, when nobody tells
constexpr uint64_t kRetry = 1'000'000'000;        // ns, after a file that could not be written
constexpr uint64_t kLookAtSpares = 500'000'000;   // ns
constexpr uint64_t kSweepFiles = 10'000'000'000;  // ns
constexpr uint64_t kPatience = 5'000'000'000;     // ns that a connection may stay silent

// Tokens: the low bits say what, the high ones which.
constexpr uint64_t kListening = 0, kSignal = 1, kClient = 2, kWatched = 3;

// Servers of this process, for its fork handlers. A few at most.
std::mutex living;
std::vector<Server*>& servers() {
  static std::vector<Server*> list;
  return list;
}

void in_child() {
  for (Server* server : servers()) server->forget_in_child();
  servers().clear();
  living.unlock();
}

// The files of a start that fails. They are this one's: it has the lock.
struct Attempt {
  const std::string& name;
  bool listening = false, failed = true;
  ~Attempt() {
    if (!failed) return;
    if (listening) os::remove_file(socket_path(name));
    os::remove_file(lock_path(name));
  }
};

void hook_forks() {
  static const int hooked = ::pthread_atfork([] { living.lock(); }, [] { living.unlock(); }, in_child);
  (void)hooked;
}

}  // namespace

struct Server::Connections {
  struct Open {
    os::Fd socket;
    uint64_t since;
    bool welcome;
  };
  std::map<int, Open> open;       // by descriptor
  std::map<int, os::Fd> watched;  // pidfds of clients
};

Server::Server(const ServerOptions& options, pool::Member& member)
    : options_(options),
      socket_path_(socket_path(options.name)),
      lock_path_(lock_path(options.name)),
      member_(member),
      connections_(std::make_unique<Connections>()) {}

Result<std::unique_ptr<Server>> Server::start(const ServerOptions& options) {
  if (Status named = check_name(options.name); !named) return named;
  if (Status made = os::private_directory(directory(), options.group); !made) return made;
  // Until the service stands, nothing of it is there for anybody: a start that fails takes all of it back.
  Cleaned cleaned;
  pool::Adoption adoption;
  auto lock = os::lock_file(lock_path(options.name), 0600);
  if (!lock) {
    if (lock.code() != Code::kExists) return std::move(lock.status());
    return Status(Code::kExists, "a store named " + options.name +
                                     " is being served already; connect to it, stop it "
                                     "(torchshm stop " +
                                     options.name + "), or choose another name");
  }
  Attempt attempt{options.name};
  TORCHSHM_POINT("serve.locked");

  // With the lock in hand, what is left of an earlier service is nobody's.
  if (!options.file.empty() && !options.spill.empty())
    return Status(Code::kInvalid,
                  "a persistent store is on disk already, all of it: spill= is for stores in memory; give file= a "
                  "larger limit");
  const pool::Pages& pages = options.limits.pages;
  if (!options.file.empty() &&
      (pages.kind != pool::PageKind::kAuto || pages.prefault || pages.numa.policy != os::Numa::Policy::kLocal))
    return Status(Code::kInvalid,
                  "hugepages=, prefault= and numa= are for stores in memory; a file has the pages of its file system");
  auto opened = options.file.empty() ? open_memory(options, adoption) : open_file(options, adoption, cleaned);
  if (!opened) return std::move(opened.status());
  pool::Member* const member = opened->member;
  std::unique_ptr<Server> server(new Server(options, *member));
  server->took_over_ = opened->was_there;
  server->catalogue_ = std::move(opened->catalogue);
  if (Status prepared = server->prepare_spill(); !prepared) return prepared;
  TORCHSHM_POINT("serve.store");
  if (options.group >= 0) {  // each client opens them again, for locks of its own
    for (const int fd : {member->arena().data_fd(), member->arena().control_fd(), server->catalogue_->fd()}) {
      if (Status given = os::give_to_group(fd, static_cast<uint32_t>(options.group)); !given) return given;
    }
  }

  const std::string& path = server->socket_path_;
  os::remove_file(path);
  auto listening = os::listen_at(path, options.mode, options.group);
  if (!listening) return std::move(listening.status());
  server->listening_ = listening.take();
  attempt.listening = true;
  TORCHSHM_POINT("serve.listening");
  auto signal = os::make_signal();
  if (!signal) return std::move(signal.status());
  server->signal_ = signal.take();
  auto poller = os::Poller::create();
  if (!poller) return std::move(poller.status());
  server->poller_ = poller.take();
  for (const auto& [fd, token] :
       {std::pair(server->listening_.get(), kListening), std::pair(server->signal_.get(), kSignal)}) {
    if (Status added = server->poller_.add(fd, token); !added) return added;
  }
  server->started_ = os::real_time();
  auto started = os::start_thread([raw = server.get()] {
    raw->begin_.wait();
    raw->run();
  });
  if (!started) return std::move(started.status());
  server->thread_ = started.take();
  if (!server->catalogue_->directory().empty()) {
    // Without it whoever needs room writes by itself.
    auto writer = os::start_thread([raw = server.get()] {
      raw->begin_.wait();
      raw->write_ahead();
    });
    if (writer) server->writer_ = writer.take();
  }
  // Nothing fails from here on.
  attempt.failed = false;
  cleaned.backing.reset();
  if (server->took_over_) server->apply_settings();
  server->lock_ = lock.take();
  server->catalogue_->header().serving.store(os::self().pid, std::memory_order_relaxed);
  adoption.keep();
  member->add_room_maker(server->catalogue_);
  hook_forks();
  {
    const std::lock_guard held(living);
    servers().push_back(server.get());
  }
  server->begin_.count_down();
  return server;
}

Server::~Server() {
  if (!thread_.joinable()) return;  // it was never in the list, or is a child's copy
  {
    const std::lock_guard held(living);
    auto& list = servers();
    list.erase(std::remove(list.begin(), list.end(), this), list.end());
  }
  ending_.store(true);
  os::raise_signal(signal_.get());
  thread_.join();
  if (writer_.joinable()) writer_.join();
}

// The thread is not here, and what it was doing is the parent's.
void Server::forget_in_child() {
  if (thread_.joinable()) thread_.detach();
  if (writer_.joinable()) writer_.detach();
  listening_.reset();
  lock_.reset();
  if (store::Backing* const backing = catalogue_->backing()) backing->unlock();
  signal_.reset();
  poller_ = {};
  connections_->open.clear();
  connections_->watched.clear();
}

void Server::write_ahead() {
  uint64_t swept = 0, looked = 0;
  uint32_t gone = 0, spares = 0;
  catalogue_->header().service.store(member_.identity(), std::memory_order_relaxed);
  while (!ending_.load() && stop_asked_.load(std::memory_order_acquire) == 0) {
    std::atomic<uint32_t>& wanted = catalogue_->header().room_wanted;
    const uint32_t seen = wanted.load(std::memory_order_relaxed);
    const uint64_t written = catalogue_->write_ahead();
    const uint64_t now = os::boot_time();
    const uint32_t discarded = catalogue_->header().discarded.load(std::memory_order_relaxed);
    if (now - looked > (discarded != gone ? kLookAhead : spares != 0 ? kLookAtSpares : now)) {
      spares = catalogue_->sweep_discarded(false);
      gone = discarded;
      looked = now;
    }
    if (now - swept > kSweepFiles && deaths_.exchange(false)) {
      if (!catalogue_->sweep_files()) deaths_ = true;  // not now
      swept = now;
    }
    if (written != 0) continue;
    const bool failing = catalogue_->header().spill_failed.load(std::memory_order_relaxed) != 0;
    (void)os::wait(wanted, failing ? wanted.load() : seen, failing ? kRetry : kLookAhead);
  }
  uint64_t me = member_.identity();
  (void)catalogue_->header().service.compare_exchange_strong(me, 0, std::memory_order_relaxed);
  (void)catalogue_->sweep_discarded(true);
}

bool Server::wait(int milliseconds) {
  const uint64_t until = os::boot_time() + static_cast<uint64_t>(milliseconds) * 1'000'000;
  while (stop_asked_.load(std::memory_order_acquire) == 0) {
    const uint64_t now = os::boot_time();
    if (now >= until || os::wait(stop_asked_, 0, until - now) == os::Wait::kInterrupted) break;
  }
  return stop_asked_.load(std::memory_order_acquire) != 0;
}

void Server::ask_to_stop() {
  stop_asked_.store(1, std::memory_order_release);
  os::wake_all(stop_asked_);
}

bool Server::welcome(const os::Peer& peer) const {
  if (peer.uid == os::effective_user()) return true;
  if (options_.group < 0) return false;
  const auto group = static_cast<uint32_t>(options_.group);
  return peer.gid == group || std::find(peer.groups.begin(), peer.groups.end(), group) != peer.groups.end();
}

void Server::accept_clients() {
  for (;;) {
    auto socket = os::accept_from(listening_.get());
    // No descriptor left: whoever waits can't be told, and is there again at once.
    if (!socket) std::this_thread::sleep_for(std::chrono::milliseconds(kRest));
    if (!socket || !socket->valid()) return;
    auto peer = os::peer_of(socket->get());
    if (!peer) continue;
    // A stranger is told so when it has asked: what it had sent unread would turn the answer into a reset. A few at a time.
    const bool known = welcome(*peer);
    if (!known && std::count_if(connections_->open.begin(), connections_->open.end(),
                                [](const auto& entry) { return !entry.second.welcome; }) >= kMostStrangers) {
      continue;
    }
    if (connections_->open.size() >= kMostConnections) continue;  // closed: the client tries again
    const int fd = socket->get();
    if (!poller_.add(fd, static_cast<uint64_t>(fd) << 8 | kClient)) continue;
    connections_->open.emplace(fd, Connections::Open{socket.take(), os::boot_time(), known});
  }
}

void Server::serve(int fd) {
  const auto found = connections_->open.find(fd);
  if (found == connections_->open.end()) return;
  // One request a connection: nothing a client does or leaves undone holds up another.
  const os::Fd socket = std::move(found->second.socket);
  const bool known = found->second.welcome;
  poller_.remove(fd);
  connections_->open.erase(found);
  Request request;
  auto received = os::receive_message(socket.get(), &request, sizeof request, 0);
  if (!received || received->length != sizeof request || request.magic != kMagic) return;
  Reply reply;
  if (!known) {
    reply.answer = Answer::kRefused;
    std::strncpy(reply.why, "it belongs to another user", sizeof reply.why - 1);
    (void)os::send_message(socket.get(), &reply, sizeof reply);
    return;
  }
  reply.pid = os::self().pid;
  reply.pool_id = member_.pool_id();
  reply.clients = clients_.load(std::memory_order_relaxed);
  reply.started = started_;
  std::vector<int> descriptors;
  switch (request.ask) {
    case Ask::kAttach: {
      descriptors = {member_.arena().data_fd(), member_.arena().control_fd(), catalogue_->fd()};
      if (const int directory = catalogue_->directory_fd(); directory >= 0) descriptors.push_back(directory);
      if (catalogue_->backing() != nullptr) descriptors = {catalogue_->fd()};  // all three are one
      if (auto peer = os::peer_of(socket.get())) {
        if (auto watch = os::watch_peer(socket.get(), peer->pid)) {
          const int watched = watch->get();
          if (poller_.add(watched, static_cast<uint64_t>(watched) << 8 | kWatched)) {
            connections_->watched.emplace(watched, watch.take());
            clients_.fetch_add(1, std::memory_order_relaxed);
          }
        }
      }
      break;
    }
    case Ask::kInfo:
      break;
    case Ask::kStop:
      ask_to_stop();
      break;
    default:
      reply.answer = Answer::kUnknown;
      std::strncpy(reply.why, "the service does not know this request", sizeof reply.why - 1);
  }
  TORCHSHM_POINT("serve.answering");
  (void)os::send_message(socket.get(), &reply, sizeof reply, descriptors);
  TORCHSHM_POINT("serve.answered");
}

void Server::tidy() {
  (void)member_.reap();
  (void)catalogue_->sweep();
  member_.look_at_warm();
  const uint64_t now = os::boot_time();
  for (auto at = connections_->open.begin(); at != connections_->open.end();) {
    if (now - at->second.since < kPatience) {
      ++at;
      continue;
    }
    poller_.remove(at->first);
    at = connections_->open.erase(at);
  }
}

void Server::run() {
  uint64_t tidied = os::boot_time();
  while (!ending_.load() && stop_asked_.load(std::memory_order_acquire) == 0) {
    bool death = false;
    for (const uint64_t token : poller_.wait(kTidyEvery)) {
      const int fd = static_cast<int>(token >> 8);
      switch (token & 0xff) {
        case kListening:
          accept_clients();
          break;
        case kClient:
          serve(fd);
          break;
        case kWatched:
          poller_.remove(fd);
          if (connections_->watched.erase(fd) != 0) clients_.fetch_sub(1, std::memory_order_relaxed);
          death = true;
          deaths_.store(true);
          break;
        default:
          break;
      }
    }
    if (!death && os::boot_time() - tidied < uint64_t{kTidyEvery} * 1'000'000) continue;
    tidy();
    tidied = os::boot_time();
  }
  // The socket first: the lock says that nobody serves, and the next one may begin.
  os::remove_file(socket_path_);
  TORCHSHM_POINT("serve.unreachable");
  listening_.reset();
  close_file();
  os::remove_file(lock_path_);
  lock_.reset();
}

}  // namespace torchshm::service
