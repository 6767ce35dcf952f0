// A store's service: found by name, refused to strangers, and dispensable.
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstring>
#include <filesystem>
#include <random>

#include "base/failpoint.h"
#include "kernel.h"
#include "service/address.h"
#include "service/client.h"
#include "service/server.h"

namespace torchshm {
namespace {

using pool::Mode;
using service::Ask;
using service::Client;
using service::Server;
using service::ServerOptions;

constexpr uint64_t kSecond = 1'000'000'000;

class Service : public testing::Test {
 protected:
  void SetUp() override { ::setenv("XDG_RUNTIME_DIR", directory_.c_str(), 1); }

  static ServerOptions options(const std::string& name = "store") {
    ServerOptions options;
    options.name = name;
    options.limits.limit = uint64_t{64} << 20;
    return options;
  }
  static std::unique_ptr<Server> start(const std::string& name = "store") {
    auto server = Server::start(options(name));
    EXPECT_TRUE(server.ok()) << server.status().what();
    return server.ok() ? server.take() : nullptr;
  }
  static Result<Client> reach(uint64_t ns = 5 * kSecond, const std::string& name = "store") {
    return service::connect(name, ns, [] { return true; });
  }
  static Status save(pool::Member& member, store::Catalogue& catalogue, const std::string& key, int byte) {
    auto view = member.allocate(5000, true);
    if (!view) return std::move(view.status());
    std::memset(view->data, byte, 5000);
    Status saved = catalogue.save(key, "", {view->block});
    member.release(view->block, Mode::kReadWrite);
    return saved;
  }
  static int load(Client& client, const std::string& key) {
    auto entry = client.catalogue->find(key);
    if (!entry) return -1;
    auto view = client.member->attach(entry->blocks[0].block, entry->blocks[0].generation, Mode::kRead);
    if (!view) return -2;
    const int byte = static_cast<int>(view->data[4999]);
    client.member->release(view->block, Mode::kRead);
    return byte;
  }

  const tests::TemporaryDirectory temporary_;
  const std::string directory_ = temporary_.path();
};

TEST_F(Service, GivesWhatOneSavesToAnother) {
  auto server = start();
  ASSERT_TRUE(save(server->member(), server->catalogue(), "mine", 1));
  EXPECT_TRUE(tests::succeeds([&] {
    auto client = reach();
    return client.ok() && load(*client, "mine") == 1 && save(*client->member, *client->catalogue, "theirs", 2).ok();
  }));
  auto client = reach();
  ASSERT_TRUE(client.ok()) << client.status().what();
  EXPECT_EQ(client->member, &server->member());  // one membership for each pool and process
  EXPECT_EQ(load(*client, "theirs"), 2);
}

TEST_F(Service, OneServesAName) {
  auto server = start();
  auto second = Server::start(options());
  EXPECT_EQ(second.code(), Code::kExists);
  EXPECT_NE(second.status().what().find("torchshm stop store"), std::string::npos);
  auto other = start("other");
  EXPECT_NE(&other->member(), &server->member());
  EXPECT_EQ(service::names(), (std::vector<std::string>{"other", "store"}));
  for (const char* name : {"", ".x", "a/b", "a b"})
    EXPECT_EQ(Server::start(options(name)).code(), Code::kInvalid) << name;
}

TEST_F(Service, ConnectWaitsForOneThatIsAboutToStart) {
  EXPECT_EQ(reach(0).code(), Code::kMissing);
  EXPECT_EQ(reach(kSecond / 20).code(), Code::kMissing);
  const pid_t pid = tests::start([&] { return reach(20 * kSecond).ok(); });
  ::usleep(50000);
  auto server = start();
  EXPECT_EQ(tests::wait_for(pid), 0);
}

TEST_F(Service, StopsWhenAskedAndLeavesNoFiles) {
  auto server = start();
  EXPECT_FALSE(server->wait(1));
  auto info = service::ask("store", Ask::kInfo);
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info->pid, static_cast<uint32_t>(::getpid()));
  EXPECT_TRUE(service::ask("store", Ask::kStop).ok());
  EXPECT_TRUE(server->wait(5000));
  server.reset();
  EXPECT_EQ(service::ask("store", Ask::kInfo).code(), Code::kMissing);
  EXPECT_TRUE(std::filesystem::is_empty(service::directory()));
}

TEST_F(Service, AskedToStopItEndsWithoutItsProgramAndAnotherTakesOver) {
  auto server = start();
  pool::Member* member = &server->member();
  ASSERT_TRUE(save(server->member(), server->catalogue(), "kept", 3));
  ASSERT_TRUE(service::ask("store", Ask::kStop).ok());
  auto next = Server::start(options());
  for (int i = 0; i < 5000 && next.code() == Code::kExists; ++i) {
    ::usleep(1000);
    next = Server::start(options());
  }
  ASSERT_TRUE(next.ok()) << next.status().what();
  EXPECT_TRUE((*next)->took_over());
  EXPECT_EQ(&(*next)->member(), member);  // this process was a member already
  server.reset();                         // does not take the new one's socket with it
  auto client = reach();
  ASSERT_TRUE(client.ok()) << client.status().what();
  EXPECT_EQ(load(*client, "kept"), 3);
}

TEST_F(Service, ClosedByTheOtherEndIsNoError) {
  ASSERT_TRUE(os::private_directory(service::directory(), -1));
  auto listening = os::listen_at(service::socket_path("store"), 0600);
  ASSERT_TRUE(listening.ok());
  auto socket = os::connect_to(service::socket_path("store"));
  ASSERT_TRUE(socket.ok());
  ASSERT_TRUE(os::send_message(socket->get(), "x", 1));
  listening->reset();  // unread
  char byte = 0;
  auto received = os::receive_message(socket->get(), &byte, 1, 1000);
  ASSERT_TRUE(received.ok()) << received.status().what();
  EXPECT_EQ(received->length, 0U);
}

// A service in a process of its own; returns its pid once it serves.
pid_t daemon(const ServerOptions& options) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    auto server = Server::start(options);
    if (!server) ::_exit(1);
    (void)(*server)->wait(60000);
    (*server).reset();
    ::_exit(0);
  }
  return pid;
}

TEST_F(Service, AKilledOneIsReplacedWithNothingLost) {
  pid_t pid = daemon(options());
  auto client = reach(20 * kSecond);
  ASSERT_TRUE(client.ok()) << client.status().what();
  for (int round = 0; round < 20; ++round) {
    const std::string key = "key" + std::to_string(round);
    ASSERT_TRUE(save(*client->member, *client->catalogue, key, round));
    ::kill(pid, SIGKILL);
    (void)tests::wait_for(pid);
    ASSERT_TRUE(save(*client->member, *client->catalogue, key + "down", round));  // nobody serves now
    EXPECT_EQ(load(*client, key), round);
    pid = daemon(options());
    ASSERT_TRUE(tests::succeeds([&] {
      auto fresh = reach(20 * kSecond);
      return fresh.ok() && load(*fresh, key) == round && load(*fresh, key + "down") == round;
    })) << round;
  }
  EXPECT_EQ(client->catalogue->size(), 40U);
  EXPECT_TRUE(service::ask("store", Ask::kStop).ok());
  EXPECT_EQ(tests::wait_for(pid), 0);
}

TEST_F(Service, DataStayWhenTheSaverIsKilled) {
  auto server = start();
  for (int i = 0; i < 50; ++i) {
    const std::string key = std::to_string(i);
    (void)tests::wait_for(tests::start([&] {
      auto client = reach();
      return client.ok() && save(*client->member, *client->catalogue, key, i).ok() && ::kill(::getpid(), SIGKILL) == 0;
    }));
    auto client = reach();
    ASSERT_EQ(load(*client, key), i);
  }
  for (int i = 0; i < 100 && server->member().stats().leases.size() > 1; ++i) ::usleep(10000);
  EXPECT_EQ(server->member().stats().leases.size(), 1U);
}

TEST_F(Service, ExpiryAndTheDeadAreSeenToWithoutBeingAsked) {
  auto server = start();
  auto view = server->member().allocate(5000, true);
  ASSERT_TRUE(server->catalogue().save("soon", "", {view->block}, {.ttl = kSecond / 20}));
  server->member().release(view->block, Mode::kReadWrite);
  for (int i = 0; i < 200 && server->member().stats().blocks > 0; ++i) ::usleep(10000);
  EXPECT_EQ(server->member().stats().blocks, 0U);
}

TEST_F(Service, AForkedChildServesNobody) {
  auto server = start();
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    char byte = 0;
    ::close(ends[1]);
    (void)!::read(ends[0], &byte, 1);
    ::_exit(0);
  }
  server.reset();
  EXPECT_EQ(reach(0).code(), Code::kMissing);  // its copies of the sockets are closed
  auto again = start();
  EXPECT_TRUE(again->took_over());  // from itself and the child
  ::close(ends[1]);
  ::close(ends[0]);
  EXPECT_EQ(tests::wait_for(child), 0);
}

TEST_F(Service, AnotherUserIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to become a second user";
  ServerOptions open = options();
  open.mode = 0666;
  auto server = Server::start(open);
  ASSERT_TRUE(server.ok());
  ::chmod(directory_.c_str(), 0755);
  ::chmod(service::directory().c_str(), 0755);  // the door is open; the service itself must refuse
  const pid_t pid = tests::start([&] {
    if (::setgid(65534) != 0 || ::setuid(65534) != 0) return false;
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, service::socket_path("store").c_str(), sizeof address.sun_path - 1);
    const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
    if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) return false;
    service::Request request;
    (void)!::send(fd, &request, sizeof request, MSG_NOSIGNAL);
    service::Reply reply;
    auto received = os::receive_message(fd, &reply, sizeof reply, 5000);
    return received.ok() && received->descriptors.empty() && reply.answer == service::Answer::kRefused;
  });
  EXPECT_EQ(tests::wait_for(pid), 0);
  EXPECT_TRUE(reach().ok());
}

TEST_F(Service, RefusesADirectoryThatOthersCanWriteTo) {
  std::filesystem::create_directory(service::directory());
  ::chmod(service::directory().c_str(), 0777);
  EXPECT_EQ(Server::start(options()).code(), Code::kInvalid);
  std::filesystem::remove(service::directory());
  std::filesystem::create_directory_symlink("/tmp", service::directory());
  EXPECT_EQ(Server::start(options()).code(), Code::kInvalid);
}

TEST_F(Service, AHostileClientHarmsNobody) {
  auto server = start();
  ASSERT_TRUE(save(server->member(), server->catalogue(), "kept", 3));
  const auto count_fds = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  };
  const auto before = count_fds();
  (void)tests::wait_for(tests::start([&] {
    std::minstd_rand random(1);
    std::vector<os::Fd> silent;
    for (int i = 0; i < 2000; ++i) {
      auto socket = os::connect_to(service::socket_path("store"));
      if (!socket) continue;
      char bytes[4096];
      for (char& byte : bytes) byte = static_cast<char>(random());
      service::Request request;
      request.ask = static_cast<Ask>(random() % 5);
      if (random() % 2 == 0) std::memcpy(bytes, &request, sizeof request);
      std::vector<int> descriptors;
      for (unsigned n = random() % 4; n > 0; --n) descriptors.push_back(static_cast<int>(random() % 3));
      if (request.ask != Ask::kStop)
        (void)os::send_message(socket->get(), bytes, 1 + random() % sizeof bytes, descriptors);
      if (random() % 4 == 0) silent.push_back(socket.take());  // never reads, never closes
    }
    return true;
  }));
  auto client = reach(20 * kSecond);
  ASSERT_TRUE(client.ok()) << client.status().what();
  EXPECT_EQ(load(*client, "kept"), 3);
  for (int i = 0; i < 1000 && count_fds() > before + 2; ++i) ::usleep(10000);
  EXPECT_LE(count_fds(), before + 2);  // the catalogue of `client`, and its watch
}

TEST_F(Service, NamesOfTooLongPathsAreAnErrorThatSaysSo) {
  ::setenv("XDG_RUNTIME_DIR", (directory_ + "/" + std::string(100, 'x')).c_str(), 1);
  std::filesystem::create_directory(std::getenv("XDG_RUNTIME_DIR"));
  auto server = Server::start(options());
  EXPECT_EQ(server.code(), Code::kInvalid);
  EXPECT_NE(server.status().what().find("longer than"), std::string::npos);
}

std::ptrdiff_t entries(const std::string& directory) {
  return std::distance(std::filesystem::directory_iterator(directory), {});
}

// More often than a process may have pools.
TEST_F(Service, AStartThatFailsLeavesNothing) {
  const std::string socket = service::socket_path("store");
  (void)start("other");
  // Where the socket should be: noticed when the store has been made.
  std::filesystem::create_directories(socket);
  const auto files = entries(service::directory()), open = entries("/proc/self/fd");
  for (int i = 0; i < 40; ++i) {
    auto server = Server::start(options());
    ASSERT_EQ(server.code(), Code::kSystem) << i << ": " << server.status().what();
    ASSERT_EQ(entries(service::directory()), files);
    ASSERT_EQ(entries("/proc/self/fd"), open);
  }
  std::filesystem::remove(socket);
  auto server = start();
  ASSERT_NE(server, nullptr);
  EXPECT_FALSE(server->took_over());
}

TEST_F(Service, AStartThatFailsLeavesTheStoreItWouldHaveTakenOver) {
  const std::string socket = service::socket_path("store");
  const pid_t pid = daemon(options());
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t keeper = tests::start([&] {
    auto client = reach(20 * kSecond);
    if (!client || !save(*client->member, *client->catalogue, "kept", 7) || ::write(ready[1], "", 1) != 1) return false;
    for (;;) ::pause();
  });
  ::close(ready[1]);
  char told;
  ASSERT_EQ(::read(ready[0], &told, 1), 1);
  ::close(ready[0]);
  ::kill(pid, SIGKILL);
  (void)tests::wait_for(pid);
  std::filesystem::remove(socket);
  std::filesystem::create_directories(socket);
  const auto open = entries("/proc/self/fd");
  for (int i = 0; i < 40; ++i) {
    auto server = Server::start(options());
    ASSERT_EQ(server.code(), Code::kSystem) << i << ": " << server.status().what();
    ASSERT_EQ(entries("/proc/self/fd"), open);
  }
  std::filesystem::remove(socket);
  auto server = start();
  ASSERT_TRUE(server != nullptr && server->took_over());
  EXPECT_EQ(server->member().stats().leases.size(), 2U);
  auto client = reach();
  ASSERT_TRUE(client.ok());
  EXPECT_EQ(load(*client, "kept"), 7);
  ::kill(keeper, SIGKILL);
  (void)tests::wait_for(keeper);
}

TEST_F(Service, WhatIsAskedOfAStoreThatIsThereBecomesItsOwn) {
  auto server = start();
  auto client = reach();
  ASSERT_TRUE(server != nullptr && client.ok());
  server.reset();
  const store::Header& header = client->catalogue->header();
  ASSERT_TRUE(server = start());
  EXPECT_EQ(header.policy.load(), static_cast<uint32_t>(store::Policy::kKeep));
  EXPECT_EQ(header.patience.load(), 0U);
  server.reset();
  ServerOptions cache = options();
  cache.policy = store::Policy::kDrop;
  cache.ttl = 100 * kSecond;
  server = Server::start(cache).take();
  EXPECT_EQ(header.policy.load(), static_cast<uint32_t>(store::Policy::kDrop));
  EXPECT_EQ(header.default_ttl.load(), 100 * kSecond);
  EXPECT_GT(header.patience.load(), 0U);
  server.reset();
  ServerOptions patient = options();
  patient.patience = 7;
  server = Server::start(patient).take();
  EXPECT_EQ(header.policy.load(), static_cast<uint32_t>(store::Policy::kDrop));  // as it was
  EXPECT_EQ(header.default_ttl.load(), 100 * kSecond);
  EXPECT_EQ(header.patience.load(), 7U);
}

TEST_F(Service, AStartThatFailsAsksNothingOfAStoreThatIsThere) {
  auto server = start();
  auto client = reach();
  ASSERT_TRUE(server != nullptr && client.ok());
  server.reset();
  const std::string socket = service::socket_path("store");
  std::filesystem::create_directories(socket);
  ServerOptions cache = options();
  cache.policy = store::Policy::kDrop;
  cache.ttl = 1;
  cache.patience = 5;
  ASSERT_EQ(Server::start(cache).code(), Code::kSystem);
  std::filesystem::remove(socket);
  const store::Header& header = client->catalogue->header();
  EXPECT_EQ(header.policy.load(), static_cast<uint32_t>(store::Policy::kKeep));
  EXPECT_EQ(header.default_ttl.load() + header.patience.load(), 0U);
}

TEST_F(Service, ClientsComeThoughTheSpillDirectoryWasRemoved) {
  ServerOptions spilling = options();
  spilling.spill = directory_ + "/spill";
  auto server = Server::start(spilling);
  ASSERT_TRUE(server.ok()) << server.status().what();
  ASSERT_TRUE(save((*server)->member(), (*server)->catalogue(), "kept", 7));
  std::filesystem::remove_all(spilling.spill);
  const int status = tests::wait_for(tests::start([&] {
    auto client = reach();
    if (!client) std::fprintf(stderr, "%s\n", client.status().what().c_str());
    return client.ok() && load(*client, "kept") == 7;
  }));
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_F(Service, AStartWithoutAThreadLeavesNothing) {
  std::filesystem::create_directory(service::directory());
  std::filesystem::permissions(service::directory(), std::filesystem::perms::owner_all);
  EXPECT_TRUE(tests::succeeds([&] {
    if (!tests::refuse(SYS_clone3, EAGAIN) || !tests::refuse(SYS_clone, EAGAIN)) return false;
    for (int i = 0; i < 40; ++i) {
      auto server = Server::start(options());
      if (server.status().what().find("no thread") == std::string::npos) return false;
    }
    return entries(service::directory()) == 0;
  }));
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST_F(Service, KilledAtAnyPointOfItsStartItIsReplaced) {
  pid_t first = daemon(options());
  auto client = reach(20 * kSecond);
  ASSERT_TRUE(client.ok());
  ASSERT_TRUE(save(*client->member, *client->catalogue, "kept", 3));
  ::kill(first, SIGKILL);
  (void)tests::wait_for(first);
  uint64_t kills = 0;
  for (uint64_t at = 1;; ++at) {
    failpoint::Plan plan;
    plan.action = failpoint::Action::kKill;
    plan.at = at;
    const int status = tests::wait_for(tests::start([&] {
      failpoint::arm(plan);
      auto server = Server::start(options());
      return server.ok();
    }));
    const pid_t pid = daemon(options());
    ASSERT_TRUE(tests::succeeds([&] {
      auto fresh = reach(20 * kSecond);
      return fresh.ok() && load(*fresh, "kept") == 3;
    })) << at;
    ASSERT_TRUE(service::ask("store", Ask::kStop).ok()) << at;
    ASSERT_EQ(tests::wait_for(pid), 0) << at;
    if (!WIFSIGNALED(status)) break;
    ++kills;
  }
  EXPECT_GT(kills, 10U);
}

#endif

}  // namespace
}  // namespace torchshm
