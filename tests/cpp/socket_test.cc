// Sockets, their directories and lock files, and waiting on a word: what comes across, and what each refusal is.
#include "os/socket.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>

#include <cstring>
#include <filesystem>
#include <string>
#include <thread>

#include "base/failpoint.h"
#include "kernel.h"
#include "os/futex.h"

namespace torchshm {
namespace {

using os::Fd;
using tests::refuse;
using tests::succeeds;

constexpr uint64_t kMinute = 60'000'000'000;

class Socket : public testing::Test {
 protected:
  void SetUp() override {
    int ends[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends), 0);
    here_ = Fd(ends[0]);
    there_ = Fd(ends[1]);
  }

  bool names(const Status& status, const char* call, int error) const {
    return status.code() == Code::kSystem && status.error() == error && status.what().find(call) != std::string::npos;
  }

  const tests::TemporaryDirectory temporary_;
  const std::string directory_ = temporary_.path(), socket_ = directory_ + "/socket";
  Fd here_, there_;
};

// A signal every 10 ms, until the process ends.
bool signals_come() {
  struct sigaction action {};
  action.sa_handler = [](int) {};
  const itimerval each{{0, 10000}, {0, 10000}};
  return ::sigaction(SIGALRM, &action, nullptr) == 0 && ::setitimer(ITIMER_REAL, &each, nullptr) == 0;
}

// ---- names

TEST_F(Socket, CarriesMessagesAndDescriptorsToWhoeverConnects) {
  auto listening = os::listen_at(socket_, 0600);
  ASSERT_TRUE(listening.ok()) << listening.status().what();
  EXPECT_FALSE(os::accept_from(listening->get())->valid());  // nobody is waiting
  auto client = os::connect_to(socket_);
  ASSERT_TRUE(client.ok()) << client.status().what();
  auto served = os::accept_from(listening->get());
  ASSERT_TRUE(served.ok() && served->valid());
  const Fd file(::memfd_create("x", MFD_CLOEXEC));
  ASSERT_TRUE(os::send_message(client->get(), "hello", 5, {file.get(), client->get()}).ok());
  char bytes[16];
  auto received = os::receive_message(served->get(), bytes, sizeof bytes, 5000);
  ASSERT_TRUE(received.ok()) << received.status().what();
  EXPECT_EQ(std::string(bytes, received->length), "hello");
  ASSERT_EQ(received->descriptors.size(), 2U);
  EXPECT_EQ(os::file_id(received->descriptors[0].get())->inode, os::file_id(file.get())->inode);
  auto peer = os::peer_of(served->get());
  ASSERT_TRUE(peer.ok());
  EXPECT_EQ(peer->pid, static_cast<uint32_t>(::getpid()));
  EXPECT_EQ(peer->uid, ::geteuid());
}

TEST_F(Socket, ThatNobodyListensAtIsMissing) {
  EXPECT_EQ(os::connect_to(socket_).code(), Code::kMissing);
  os::listen_at(socket_, 0600).take().reset();
  EXPECT_EQ(os::connect_to(socket_).code(), Code::kMissing);  // what its process has left
  os::remove_file(socket_);
  const Fd busy = os::listen_at(socket_, 0600).take();
  ASSERT_EQ(::listen(busy.get(), 0), 0);
  std::vector<Fd> waiting;
  Code last = Code::kOk;
  for (int i = 0; i < 10 && last == Code::kOk; ++i) {
    auto client = os::connect_to(socket_);
    last = client.code();
    if (client) waiting.push_back(client.take());
  }
  EXPECT_EQ(last, Code::kMissing);
}

TEST_F(Socket, OfATooLongNameIsRefused) {
  const std::string name = directory_ + "/" + std::string(120, 'x');
  EXPECT_EQ(os::listen_at(name, 0600).code(), Code::kInvalid);
  EXPECT_EQ(os::connect_to(name).code(), Code::kInvalid);
}

TEST_F(Socket, EachStepThatFailsIsNamed) {
  EXPECT_TRUE(names(os::accept_from(-1).status(), "accept4", EBADF));
  EXPECT_TRUE(names(os::peer_of(-1).status(), "SO_PEERCRED", EBADF));
  const Fd listening = os::listen_at(socket_, 0600).take();
  EXPECT_TRUE(names(os::listen_at(socket_, 0600).status(), "bind", EADDRINUSE));
  EXPECT_TRUE(succeeds([&] {
    const tests::Limited descriptors(RLIMIT_NOFILE, 0);
    return names(os::connect_to(socket_).status(), "socket", EMFILE) &&
           names(os::listen_at(socket_ + "2", 0600).status(), "socket", EMFILE) &&
           names(os::Poller::create().status(), "epoll_create1", EMFILE) &&
           names(os::make_signal().status(), "eventfd", EMFILE) &&
           names(os::lock_file(directory_ + "/lock", 0600).status(), "open", EMFILE);
  }));
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds(
      [&] { return refuse(SYS_connect, EPERM) && names(os::connect_to(socket_).status(), "connect", EPERM); }));
  for (const long call : {SYS_fchmod, SYS_chmod, SYS_listen}) {
    EXPECT_TRUE(succeeds([&] {
      return refuse(call, EPERM) && refuse(SYS_fchmodat, EPERM) &&
             names(os::listen_at(socket_ + std::to_string(call), 0600).status(), "bind", EPERM);
    })) << call;
  }
  for (const int error : {EINTR, ECONNABORTED}) {  // as good as nobody
    EXPECT_TRUE(succeeds([&] {
      if (!refuse(SYS_accept4, error)) return false;
      auto accepted = os::accept_from(listening.get());
      return accepted.ok() && !accepted->valid();
    }));
  }
}

// ---- messages

TEST_F(Socket, WhoDoesNotReadIsFullAndWhoIsGoneIsAnError) {
  const char bytes[16] = {};
  Status sent;
  for (int i = 0; i < 100000 && sent; ++i) sent = os::send_message(here_.get(), bytes, sizeof bytes);
  EXPECT_EQ(sent.code(), Code::kFull);
  there_.reset();
  EXPECT_TRUE(names(os::send_message(here_.get(), bytes, sizeof bytes), "sendmsg", ECONNRESET));  // unread
  EXPECT_TRUE(names(os::send_message(here_.get(), bytes, sizeof bytes), "sendmsg", EPIPE));
}

TEST_F(Socket, ClosedByTheOtherEndReadsAsNothing) {
  char bytes[16];
  ASSERT_TRUE(os::send_message(here_.get(), "unread", 6).ok());
  there_.reset();
  auto reset = os::receive_message(here_.get(), bytes, sizeof bytes, 5000);
  ASSERT_TRUE(reset.ok()) << reset.status().what();
  EXPECT_EQ(reset->length, 0U);
  auto closed = os::receive_message(here_.get(), bytes, sizeof bytes, 5000);
  ASSERT_TRUE(closed.ok());
  EXPECT_EQ(closed->length, 0U);
}

TEST_F(Socket, MessagesThatAreTooLongAreRefusedAndTheirDescriptorsClosed) {
  char bytes[16] = {};
  ASSERT_TRUE(os::send_message(here_.get(), bytes, sizeof bytes, {0}).ok());
  const Fd next(::dup(0));
  const int lowest = next.get();
  EXPECT_EQ(os::receive_message(there_.get(), bytes, 8, 5000).code(), Code::kInvalid);
  const Fd after(::dup(0));
  EXPECT_EQ(after.get(), lowest + 1);  // nothing stayed open
}

TEST_F(Socket, ThatTellsWhoSentReadsTheMessageAlone) {
  const int on = 1;
  ASSERT_EQ(::setsockopt(there_.get(), SOL_SOCKET, SO_PASSCRED, &on, sizeof on), 0);
  ASSERT_TRUE(os::send_message(here_.get(), "hello", 5).ok());
  char bytes[16];
  auto received = os::receive_message(there_.get(), bytes, sizeof bytes, 5000);
  ASSERT_TRUE(received.ok()) << received.status().what();
  EXPECT_EQ(received->length, 5U);
  EXPECT_TRUE(received->descriptors.empty());
}

TEST_F(Socket, ReceivingWaitsThroughSignalsAndNotForever) {
  char bytes[16];
  EXPECT_TRUE(names(os::receive_message(here_.get(), bytes, sizeof bytes, 1).status(), "recvmsg", ETIMEDOUT));
  EXPECT_TRUE(succeeds([&] {
    std::thread other([&] {
      ::usleep(100000);  // several signals; that a machine may be slower than this makes the test weaker, not wrong
      (void)os::send_message(there_.get(), "late", 4);
    });
    const bool set = signals_come();
    auto received = os::receive_message(here_.get(), bytes, sizeof bytes, 60000);
    other.join();
    return set && received.ok() && received->length == 4;
  }));
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([&] {  // without the wait: what is there is read, and what is not is an error
    return refuse(SYS_poll, ENOMEM) && os::send_message(there_.get(), "here", 4).ok() &&
           os::receive_message(here_.get(), bytes, sizeof bytes, 5000).ok() &&
           names(os::receive_message(here_.get(), bytes, sizeof bytes, 5000).status(), "recvmsg", EAGAIN);
  }));
}

// ---- who is there

TEST_F(Socket, ThePeerIsKnownToOlderKernelsToo) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([&] {
    if (!refuse(SYS_getsockopt, ENOPROTOOPT, 2, 59)) return false;  // SO_PEERGROUPS
    auto peer = os::peer_of(here_.get());
    return peer.ok() && peer->uid == ::geteuid() && peer->groups.empty();
  }));
}

TEST_F(Socket, TheEndOfThePeersProcessIsSeen) {
  if (tests::under_valgrind()) GTEST_SKIP() << "valgrind knows no pidfd_open()";
  const auto sees_the_end = [&] {
    int go[2];
    if (::pipe(go) != 0) return false;
    const pid_t child = ::fork();
    if (child == 0) {
      ::close(go[1]);
      char byte = 0;
      (void)!::read(go[0], &byte, 1);
      ::_exit(0);
    }
    auto watched = os::watch_peer(-1, static_cast<uint32_t>(child));
    auto poller = os::Poller::create();
    if (!watched || !poller || !poller->add(watched->get(), 7)) return false;
    const bool alive = poller->wait(0).empty();
    ::close(go[1]);
    const bool ended = poller->wait(60000) == std::vector<uint64_t>{7};
    poller->remove(watched->get());
    (void)tests::wait_for(child);
    return alive && ended && poller->wait(0).empty();
  };
  EXPECT_TRUE(succeeds(sees_the_end));
  auto itself = os::watch_peer(here_.get(), static_cast<uint32_t>(::getpid()));
  EXPECT_TRUE(itself.ok()) << itself.status().what();
  EXPECT_TRUE(names(os::watch_peer(-1, 0x7ffffff0).status(), "pidfd_open", ESRCH));
}

TEST_F(Socket, APollerTakesNoClosedDescriptor) {
  auto poller = os::Poller::create();
  ASSERT_TRUE(poller.ok());
  EXPECT_TRUE(names(poller->add(-1, 1), "epoll_ctl", EBADF));
  const Fd signal = os::make_signal().take();
  ASSERT_TRUE(poller->add(signal.get(), 5).ok());
  os::raise_signal(signal.get());
  EXPECT_EQ(poller->wait(60000), std::vector<uint64_t>{5});
}

// ---- directories and lock files

TEST_F(Socket, ItsDirectoryIsForThisUserAlone) {
  const std::string made = directory_ + "/made";
  ASSERT_TRUE(os::private_directory(made, -1).ok());
  ASSERT_TRUE(os::private_directory(made, -1).ok());  // there already
  const auto mode = [&] { return static_cast<unsigned>(std::filesystem::status(made).permissions()); };
  EXPECT_EQ(mode(), 0700U);
  ::chmod(made.c_str(), 0500);
  EXPECT_TRUE(os::private_directory(made, -1).ok());
  ::chmod(made.c_str(), 0755);
  EXPECT_EQ(os::private_directory(made, -1).code(), Code::kInvalid);
  EXPECT_TRUE(os::private_directory(made, static_cast<int64_t>(::getegid())).ok());
  EXPECT_EQ(mode(), 0711U);
  EXPECT_TRUE(os::private_directory(made, -1).ok());  // who has its name may open what lies in it, and no more
  ::chmod(made.c_str(), 0770);
  EXPECT_EQ(os::private_directory(made, static_cast<int64_t>(::getegid())).code(), Code::kInvalid);
  ::chmod(made.c_str(), 0700);
  ASSERT_TRUE(tests::write_file(directory_ + "/file", ""));
  EXPECT_EQ(os::private_directory(directory_ + "/file", -1).code(), Code::kInvalid);
  EXPECT_TRUE(names(os::private_directory(directory_ + "/not/there", -1), "mkdir", ENOENT));
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([&] { return refuse(SYS_newfstatat, EIO) && !os::private_directory(made, -1); }));
  EXPECT_TRUE(succeeds([&] {
    return refuse(SYS_chmod, EPERM) && refuse(SYS_fchmodat, EPERM) &&
           names(os::private_directory(made, static_cast<int64_t>(::getegid())), "chmod", EPERM);
  }));
}

TEST_F(Socket, ItsDirectoryHasOneWriter) {
  const std::string made = directory_ + "/made";
  ASSERT_TRUE(os::private_directory(made, -1).ok());
  const auto self = static_cast<uint32_t>(::geteuid());
  EXPECT_TRUE(os::only_writer(made, self));
  EXPECT_EQ(os::only_writer(made, self + 1), self == 0);  // root may write everywhere
  ::chmod(made.c_str(), 0711);
  EXPECT_TRUE(os::only_writer(made, self));
  ::chmod(made.c_str(), 0772);
  EXPECT_FALSE(os::only_writer(made, self));
  EXPECT_FALSE(os::only_writer(directory_ + "/not/there", self));
  ASSERT_TRUE(tests::write_file(directory_ + "/file", ""));
  EXPECT_FALSE(os::only_writer(directory_ + "/file", self));
  if (self != 0) return;
  ASSERT_EQ(::chown(made.c_str(), 4321, 4321), 0);
  ::chmod(made.c_str(), 0700);
  EXPECT_TRUE(os::only_writer(made, 4321));
  EXPECT_FALSE(os::only_writer(made, 4322));
}

TEST_F(Socket, GivesItselfAndMemoryFilesToAGroup) {
  const auto group = static_cast<int64_t>(::getegid());
  const Fd listening = os::listen_at(socket_, 0660, group).take();
  struct stat st {};
  ASSERT_EQ(::stat(socket_.c_str(), &st), 0);
  EXPECT_EQ(st.st_gid, group);
  EXPECT_EQ(st.st_mode & 0777, 0660U);
  auto file = os::create_memfd("torchshm-test", 4096);
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(os::give_to_group(file->get(), static_cast<uint32_t>(group)));
  ASSERT_EQ(::fstat(file->get(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0660U);
  EXPECT_EQ(os::give_to_group(-1, static_cast<uint32_t>(group)).error(), EBADF);
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([&] {
    return refuse(SYS_chown, EPERM) && refuse(SYS_fchownat, EPERM) &&
           names(os::listen_at(socket_ + "2", 0660, group).status(), "bind", EPERM);
  }));
  EXPECT_TRUE(succeeds([&] {
    return refuse(SYS_fchmod, EPERM) &&
           names(os::give_to_group(file->get(), static_cast<uint32_t>(group)), "fchown", EPERM);
  }));
}

TEST_F(Socket, ADirectoryOfAnotherUserIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to become a second user";
  ASSERT_TRUE(os::private_directory(directory_ + "/made", -1).ok());
  ::chmod(directory_.c_str(), 0755);
  EXPECT_TRUE(succeeds([&] {
    if (::seteuid(65534) != 0) return false;
    const Code code = os::private_directory(directory_ + "/made", -1).code();
    return ::seteuid(0) == 0 && code == Code::kInvalid;
  }));
}

TEST_F(Socket, ALockFileIsOnesUntilItIsClosed) {
  const std::string lock = directory_ + "/lock";
  EXPECT_EQ(os::identity_of(lock), 0U);
  Fd first = os::lock_file(lock, 0600).take();
  EXPECT_NE(os::identity_of(lock), 0U);
  EXPECT_EQ(os::lock_file(lock, 0600).code(), Code::kExists);
  first.reset();
  EXPECT_TRUE(os::lock_file(lock, 0600).ok());
  EXPECT_TRUE(names(os::lock_file(directory_ + "/not/there", 0600).status(), "open", ENOENT));
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds(
      [&] { return refuse(SYS_flock, ENOLCK) && names(os::lock_file(lock, 0600).status(), "flock", ENOLCK); }));
  EXPECT_TRUE(succeeds([&] {
    return refuse(SYS_newfstatat, EIO) && refuse(SYS_fstat, EIO) &&
           names(os::lock_file(lock, 0600).status(), "fstat", EIO);
  }));
}

// The holder removes the file while the other waits for its lock: what that gets is the lock of the file that is there.
TEST_F(Socket, TheLockOfARemovedFileIsNoLock) {
  const std::string lock = directory_ + "/lock";
  const auto turns = [&] {
    for (int held = 0; held < 300;) {
      auto mine = os::lock_file(lock, 0600);
      if (!mine) {
        if (mine.code() != Code::kExists) return false;
        continue;
      }
      struct stat there {
      }, here{};
      if (::stat(lock.c_str(), &there) != 0 || ::fstat(mine->get(), &here) != 0 || here.st_ino != there.st_ino)
        return false;
      os::remove_file(lock);
      ++held;
    }
    return true;
  };
  const pid_t other = tests::start(turns);
  EXPECT_TRUE(turns());
  EXPECT_EQ(tests::wait_for(other), 0);
}

// ---- a word

TEST(Futex, AWaitEndsByAChangeASignalOrItsTime) {
  std::atomic<uint32_t> word{1};
  EXPECT_EQ(os::wait(word, 0, kMinute), os::Wait::kChanged);
  EXPECT_EQ(os::wait(word, 1, 1000), os::Wait::kTimedOut);
  EXPECT_TRUE(succeeds([&] { return signals_come() && os::wait(word, 1, kMinute) == os::Wait::kInterrupted; }));
  std::atomic<bool> awake{false};
  std::thread other([&] {
    while (!awake.load()) os::wake_all(word);
  });
  EXPECT_EQ(os::wait(word, 1, kMinute), os::Wait::kChanged);
  awake.store(true);
  other.join();
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST_F(Socket, EveryCallThatIsMadeToFailIsAnError) {
  const Fd listening = os::listen_at(socket_, 0600).take();
  char bytes[16] = {};
  ASSERT_TRUE(os::send_message(there_.get(), bytes, 1).ok());
  const auto failing = [](const char* name, const std::function<Status()>& call) {
    failpoint::arm({failpoint::Action::kFail, 1, true, EPERM, name});
    const Status status = call();
    failpoint::disarm();
    return status.error() == EPERM;
  };
  EXPECT_TRUE(failing("os.socket", [&] { return std::move(os::connect_to(socket_).status()); }));
  EXPECT_TRUE(failing("os.bind", [&] { return std::move(os::listen_at(socket_ + "2", 0600).status()); }));
  EXPECT_TRUE(failing("os.connect", [&] { return std::move(os::connect_to(socket_).status()); }));
  EXPECT_TRUE(failing("os.sendmsg", [&] { return os::send_message(here_.get(), bytes, 1); }));
  EXPECT_TRUE(
      failing("os.recvmsg", [&] { return std::move(os::receive_message(here_.get(), bytes, 16, 5000).status()); }));
}

#endif

}  // namespace
}  // namespace torchshm
