// A persistent store's file: its bytes, and what is in it when those who use it die at any point, or a system call fails.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <filesystem>

#include "base/failpoint.h"
#include "os/lock.h"
#include "os/mapped_file.h"
#include "parts.h"
#include "pool/checker.h"
#include "service/client.h"
#include "service/server.h"
#include "store/file_layout.h"
#include "store/store_file.h"
#include "stores.h"

namespace torchshm {
namespace {

namespace fs = std::filesystem;
using failpoint::Action;
using service::Server;
using store::Superblock;
using tests::Between;

TEST(StoreFileLayout, TheSuperblockKeepsItsBytes) {
  EXPECT_EQ(sizeof(Superblock), 192U);
  EXPECT_EQ(offsetof(Superblock, magic), 0U);
  EXPECT_EQ(offsetof(Superblock, version), 8U);
  EXPECT_EQ(offsetof(Superblock, pool_version), 12U);
  EXPECT_EQ(offsetof(Superblock, store_version), 16U);
  EXPECT_EQ(offsetof(Superblock, ready), 28U);
  EXPECT_EQ(offsetof(Superblock, size), 32U);
  EXPECT_EQ(offsetof(Superblock, data_at), 72U);
  EXPECT_EQ(offsetof(Superblock, pool_id), 88U);
  EXPECT_EQ(offsetof(Superblock, state), 96U);
  EXPECT_EQ(offsetof(Superblock, boot), 104U);
  EXPECT_EQ(offsetof(Superblock, clock), 120U);
  EXPECT_EQ(store::kFileVersion, 1U);
  EXPECT_EQ(store::kControlAt % pool::kChunk, 0U);
}

TEST(StoreFileLayout, RegionsBeginAtMultiplesOfAChunkAndHoldTheLimit) {
  for (const uint64_t limit : {uint64_t{1}, uint64_t{100} << 20, uint64_t{3} << 40, UINT64_MAX}) {
    const auto regions = pool::Regions::of(limit, store::kControlAt);
    EXPECT_EQ(regions.data_at % pool::kChunk, 0U);
    EXPECT_EQ(regions.data_size % pool::kChunk, 0U);
    EXPECT_GE(regions.data_at, regions.control_at + regions.control_size);
    EXPECT_GE(regions.data_size, std::min(limit, uint64_t{8} << 40));
  }
}

class StoreFile : public testing::Test {
 protected:
  void SetUp() override {
    ::setenv("XDG_RUNTIME_DIR", directory_.c_str(), 1);
    progress_ =
        static_cast<int*>(::mmap(nullptr, sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(progress_, MAP_FAILED);
  }
  void TearDown() override {
    ::munmap(progress_, sizeof(int));
    fs::remove_all(directory_);
  }

  static Result<std::unique_ptr<Server>> serve(const std::string& path) {
    service::ServerOptions options;
    options.name = "file";
    options.limits.limit = uint64_t{8} << 20;
    options.file = path;
    return Server::start(options);
  }

  static Status put(Server& server, const std::string& key, int byte, uint64_t bytes = 5000) {
    auto view = server.member().allocate(bytes, true);
    if (!view) return std::move(view.status());
    std::memset(view->data, byte, bytes);
    Status saved = server.catalogue().save(key, std::string(200, static_cast<char>(byte)), {view->block, view->block},
                                           {.overwrite = true});
    server.member().release(view->block, pool::Mode::kReadWrite);
    return saved;
  }

  // -1: no such name; -2: not what anybody saved.
  static int get(Server& server, const std::string& key) {
    auto entry = server.catalogue().find(key);
    if (!entry) return -1;
    if (entry->blocks.size() != 2 || entry->text.size() != 200) return -2;
    auto view = server.member().attach(entry->blocks[0].block, entry->blocks[0].generation, pool::Mode::kRead);
    if (!view) return -2;
    bool whole = true;
    for (uint64_t i = 0; i < 5000; ++i) whole = whole && view->data[i] == static_cast<std::byte>(entry->text[0]);
    server.member().release(view->block, pool::Mode::kRead);
    return whole ? entry->text[0] : -2;
  }

  // With a name of each kind of place, and work that was left half done.
  void make(const std::string& path, bool clean) {
    const int status = tests::wait_for(tests::start([&] {
      auto server = serve(path);
      if (!server) return false;
      bool fine = put(**server, "a", 1).ok() && put(**server, std::string(300, 'l'), 2).ok() &&
                  put(**server, "big", 3, 1 << 20).ok();
      if (!fine) return false;
      if (clean) {
        server->reset();
        return true;
      }
      failpoint::Plan plan;
      plan.action = Action::kKill;
      plan.only = "save.kept";
      plan.at = 2;
      failpoint::arm(plan);
      (void)put(**server, "half", 4);
      return false;
    }));
    ASSERT_TRUE(clean ? WIFEXITED(status) && WEXITSTATUS(status) == 0 : WIFSIGNALED(status));
  }

  // As if the machine had been started anew.
  static void other_boot(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    ASSERT_GE(fd, 0);
    const uint64_t boot[2] = {1, 2};
    ASSERT_EQ(::pwrite(fd, boot, sizeof boot, offsetof(Superblock, boot)), static_cast<ssize_t>(sizeof boot));
    ::close(fd);
  }

  // How "w" may stand after so many acknowledged steps of work().
  static bool allowed(int value, int acknowledged) {
    const int after[] = {-1, 10, 11, -1, 12};
    return value == after[acknowledged] || (acknowledged < 4 && value == after[acknowledged + 1]);
  }
  static Status work(Server& server, int* progress) {
    for (int step = 0; step < 4; ++step) {
      if (step == 2) {
        if (!server.catalogue().remove("w")) return Status(Code::kSystem, "not removed");
      } else if (Status saved = put(server, "w", step == 0 ? 10 : step == 1 ? 11 : 12); !saved) {
        return saved;
      }
      *progress = step + 1;
    }
    return {};
  }

  // What must hold afterwards, in a process of its own: first as it is read, then as it is served.
  bool sound(const std::string& path, bool finished) {
    return tests::succeeds([&] {
      {
        auto file = store::StoreFile::open(path);
        if (!file && finished) {
          std::fprintf(stderr, "it can't be read: %s\n", file.status().what().c_str());
          return false;
        }
        if (file) {
          int names = 0;
          (*file)->each("", [&](const store::Entry& entry) {
            if ((*file)->block(entry.blocks[0].block, entry.blocks[0].generation).ok()) ++names;
          });
          if (static_cast<uint64_t>(names) != (*file)->size()) return false;
        }
      }
      auto server = serve(path);
      if (!server) {
        std::fprintf(stderr, "it can't be served: %s\n", server.status().what().c_str());
        return false;
      }
      const int a = get(**server, "a"), l = get(**server, std::string(300, 'l')), b = get(**server, "big"),
                w = get(**server, "w");
      const bool there = !finished || (a == 1 && l == 2 && b == 3);
      if (!there || !allowed(w, *progress_)) {
        std::fprintf(stderr, "a %d l %d big %d, w %d after %d steps\n", a, l, b, w, *progress_);
        return false;
      }
      auto pool = pool::check((*server)->member().arena(), {.at_rest = true});
      if (!pool.ok()) {
        std::fprintf(stderr, "%s\n", pool.first().c_str());
        return false;
      }
      auto report =
          store::check_catalogue((*server)->catalogue().fd(), (*server)->member().arena(), true, store::kCatalogueAt);
      if (!report || !report->ok()) {
        std::fprintf(stderr, "%s\n", report ? report->first().c_str() : report.status().what().c_str());
        return false;
      }
      return true;
    });
  }

  // Does `operation` to a copy of `made` (to no file, where that is empty) until it passes without the n-th point; in steps of `stride`.
  void at_every_point(const std::string& made, Action action, uint64_t stride,
                      const std::function<void(const std::string&)>& operation) {
    uint64_t reached = 0;
    for (uint64_t n = 1; n < 100'000; n += stride) {
      const std::string path = directory_ + "/" + std::to_string(n) + ".store";
      if (!made.empty()) {
        ASSERT_EQ(std::system(("cp --sparse=always " + made + " " + path).c_str()), 0);
      }
      *progress_ = 0;
      int acted[2];
      ASSERT_EQ(::pipe(acted), 0);
      const int status = tests::wait_for(tests::start([&] {
        failpoint::Plan plan;
        plan.action = action;
        plan.at = n;
        plan.error = ENOSPC;
        failpoint::arm(plan);
        operation(path);
        const uint64_t passed = failpoint::reached();
        failpoint::disarm();
        return ::write(acted[1], &passed, sizeof passed) == sizeof passed;
      }));
      ::close(acted[1]);
      uint64_t passed = 0;
      const bool ended = ::read(acted[0], &passed, sizeof passed) == sizeof passed;
      ::close(acted[0]);
      ASSERT_EQ(ended, WIFEXITED(status) && WEXITSTATUS(status) == 0);
      if (!ended) {
        ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "status " << status << ", point " << n;
      }
      ASSERT_TRUE(sound(path, !made.empty())) << "point " << n;
      fs::remove(path);
      reached = n;
      if (ended && passed < n) break;
    }
    EXPECT_GT(reached, 10U);
    RecordProperty("points", static_cast<int>(reached));
  }

  const std::string directory_ = [] {
    // In memory: hundreds of files are made, and written out.
    std::string name = std::string(::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + "/torchshm-file-XXXXXX";
    return std::string(::mkdtemp(name.data()));
  }();
  int* progress_ = nullptr;
};

TEST_F(StoreFile, LocksOfLeasesAndOfNamesDoNotMeetInOneFile) {
  const std::string path = directory_ + "/locks.store";
  auto server = serve(path);
  ASSERT_TRUE(server.ok()) << server.status().what();
  auto other = os::open_to_read(path);
  ASSERT_TRUE(other.ok());
  EXPECT_TRUE(os::any_locked(other->get(), 0, pool::kMaxLeases));
  EXPECT_FALSE(os::any_locked(other->get(), pool::kMaxLeases, (uint64_t{1} << 62) - pool::kMaxLeases));
  EXPECT_FALSE(os::any_locked(other->get(), uint64_t{1} << 62, (uint64_t{1} << 62)));
}

TEST_F(StoreFile, DeathsWhileItIsMadeLeaveOneThatIsMadeAnew) {
  at_every_point("", Action::kKill, 1, [](const std::string& path) { (void)serve(path); });
}

TEST_F(StoreFile, DeathsWhileItIsStartedAreFinishedByTheNext) {
  const std::string made = directory_ + "/made";
  make(made, false);
  at_every_point(made, Action::kKill, 1, [](const std::string& path) { (void)serve(path); });
}

TEST_F(StoreFile, DeathsWhileItIsStartedAfterABootAreFinishedByTheNext) {
  const std::string made = directory_ + "/made";
  make(made, true);
  other_boot(made);
  at_every_point(made, Action::kKill, 1, [](const std::string& path) { (void)serve(path); });
}

TEST_F(StoreFile, DeathsAtWorkLeaveWhatWasAcknowledged) {
  const std::string made = directory_ + "/made";
  make(made, true);
  at_every_point(made, Action::kKill, 3, [&](const std::string& path) {
    auto server = serve(path);
    if (server) (void)work(**server, progress_);
  });
}

TEST_F(StoreFile, FailingCallsAreErrorsAndLoseNothing) {
  const std::string made = directory_ + "/made";
  make(made, false);
  at_every_point(made, Action::kFail, 1, [&](const std::string& path) {
    auto server = serve(path);
    if (server) (void)work(**server, progress_);
  });
}

// After a loss of power it would else pass for one that was in use.
TEST_F(StoreFile, AStartThatFailsLeavesACleanFileClean) {
  const std::string made = directory_ + "/made";
  make(made, true);
  at_every_point(made, Action::kFail, 1, [&](const std::string& path) {
    auto server = serve(path);
    if (server) return;
    uint32_t state = store::kOpen;
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (::pread(fd, &state, sizeof state, offsetof(Superblock, state)) != sizeof state || state != store::kClean)
      ::abort();
    ::close(fd);
  });
}

// One that had the service's answer before it closed the file: what it changes is on the disk half, after a loss of power.
TEST_F(StoreFile, OneWhoComesAsItIsClosedFindsItOpen) {
  const std::string path = directory_ + "/late";
  make(path, true);
  const int late = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(late, 0);
  const auto state = [&] {
    uint32_t found = 0;
    EXPECT_EQ(::pread(late, &found, sizeof found, offsetof(Superblock, state)), ssize_t{sizeof found});
    return found;
  };
  {
    auto started = serve(path);
    ASSERT_TRUE(started) << started.status().what();
    std::unique_ptr<Server> server = started.take();
    const uint32_t clean = store::kClean;
    ASSERT_EQ(::pwrite(late, &clean, sizeof clean, offsetof(Superblock, state)), ssize_t{sizeof clean});
    ASSERT_TRUE(service::connect("file", 0, [] { return false; }));
    EXPECT_EQ(state(), uint32_t{store::kOpen});
    const Between between("backing.written", [&] {
      struct flock lease {};
      lease.l_type = F_WRLCK;
      lease.l_whence = SEEK_SET;
      lease.l_start = 7;
      lease.l_len = 1;
      ASSERT_EQ(::fcntl(late, F_OFD_SETLK, &lease), 0);
    });
    server.reset();
  }
  EXPECT_EQ(state(), uint32_t{store::kOpen});
  ::close(late);
}

TEST_F(StoreFile, IsTrustedUnlessTheMachineWentDownWhileItWasInUse) {
  for (const bool clean : {true, false}) {
    for (const bool boot : {false, true}) {
      const std::string path = directory_ + "/trusted";
      fs::remove(path);
      make(path, clean);
      if (boot) other_boot(path);
      auto file = store::StoreFile::open(path, true);
      ASSERT_TRUE(file.ok()) << file.status().what();
      EXPECT_EQ((*file)->trusted(), clean || !boot);
    }
  }
}

TEST_F(StoreFile, FailingCallsWhileItIsMadeLeaveNoHalfOfAFile) {
  at_every_point("", Action::kFail, 1, [&](const std::string& path) {
    if (!serve(path).ok() && fs::exists(path) && fs::file_size(path) != 0) {
      // It was finished before the service failed.
      failpoint::disarm();
      if (!store::StoreFile::open(path)) ::abort();
    }
  });
}

}  // namespace
}  // namespace torchshm
