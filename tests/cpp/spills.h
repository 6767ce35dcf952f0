// Stores with a spill directory for tests, and threads that are held up at a point while the test does something else.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/failpoint.h"
#include "os/fd.h"
#include "store/spill.h"
#include "store/spill_file.h"
#include "stores.h"

namespace torchshm::tests {

class Folder {
 public:
  Folder() : path_("/tmp/torchshm-spill-XXXXXX") { EXPECT_NE(::mkdtemp(path_.data()), nullptr); }
  ~Folder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  const std::string& path() const { return path_; }
  // Names of the files of values and of parts of them.
  std::vector<std::string> files() const {
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path_)) {
      const std::string extension = entry.path().extension();
      if (extension == ".spill" || extension == ".part" || extension == ".spare") found.push_back(entry.path());
    }
    return found;
  }

 private:
  std::string path_;
};

// Of a store in this process: who spills, and the store's own.
struct Spilling : Store {
  std::unique_ptr<store::Spill> spill;
  Spilling(Store&& store) : Store(std::move(store)), spill(std::make_unique<store::Spill>(*catalogue)) {}
};

inline Spilling with_directory(Store&& store, const Folder& folder) {
  Spilling made(std::move(store));
  auto own = store::SpillDirectory::make(folder.path(), "test", made.member->pool_id(), false, -1);
  EXPECT_TRUE(own.ok()) << own.status().what();
  made.catalogue->use(own.take());
  auto beside = store::SpillDirectory::make(folder.path(), "test", made.member->pool_id(), false, -1);
  EXPECT_TRUE(beside.ok()) << beside.status().what();
  made.spill->use(beside.take());
  made.catalogue->set_directory(folder.path());
  return made;
}

inline Spilling fresh_spilling(const Folder& folder, uint64_t limit = uint64_t{256} << 20) {
  return with_directory(fresh_store(limit), folder);
}
inline Spilling join_spilling(Store& other, const Folder& folder) { return with_directory(join(other), folder); }

using How = store::Spill::How;

inline Result<uint64_t> out(Spilling& store, const std::string& key, How how = How::kWrite) {
  auto entry = store->find(key);
  if (!entry) return std::move(entry.status());
  return store.spill->out(entry->cell, entry->life, how);
}
inline bool on_disk(Store& store, const std::string& key) {
  auto entry = store->find(key);
  return entry.ok() && entry->spilled;
}
// Brought back where it must be: see loaded().
inline int back(Store& store, const std::string& key, uint64_t bytes = 5000) {
  if (Status done = store->restore(key); !done) {
    ADD_FAILURE() << done.what();
    return -3;
  }
  return loaded(store, key, bytes);
}
inline store::StandingValue standing(Store& store, uint32_t cell) {
  return store::StandingValue::of(store->use_of(cell).standing.load());
}

// Holds a thread up at the nth time that it passes a point, until release().
class HeldUp {
 public:
  HeldUp(const char* point, const std::function<void()>& work, int nth = 1) {
    now() = this;
    point_ = point;
    nth_ = nth;
    failpoint::Plan plan;
    plan.watch = [](const char* name, bool) {
      HeldUp* self = now();
      if (!mine || self == nullptr || std::strcmp(name, self->point_) != 0 || --self->nth_ != 0) return;
      std::unique_lock lock(self->mutex_);
      self->there_ = true;
      self->changed_.notify_all();
      self->changed_.wait(lock, [&] { return self->go_on_; });
    };
    failpoint::arm(plan);
    thread_ = std::thread([this, work] {
      mine = true;
      work();
      const std::lock_guard lock(mutex_);
      done_ = true;
      changed_.notify_all();
    });
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return there_ || done_; });
    EXPECT_TRUE(there_) << "never came to " << point;
  }
  void release() {
    {
      const std::lock_guard lock(mutex_);
      go_on_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
    now() = nullptr;
    failpoint::disarm();
  }
  ~HeldUp() { release(); }
  HeldUp(const HeldUp&) = delete;
  HeldUp& operator=(const HeldUp&) = delete;

 private:
  static HeldUp*& now() {
    static HeldUp* current = nullptr;
    return current;
  }
  inline static thread_local bool mine = false;
  const char* point_;
  int nth_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool there_ = false, go_on_ = false, done_ = false;
  std::thread thread_;
};

// A further process that does `work` on the store and is killed at the nth pass of a point. False when it came to the end.
inline bool dies_at(Store& store, const Folder& folder, const char* point, const std::function<void(Spilling&)>& work,
                    uint64_t nth = 1) {
  const pid_t pid = start([&] {
    auto mine = join_spilling(store, folder);
    failpoint::Plan plan;
    plan.action = failpoint::Action::kKill;
    plan.only = point;
    plan.at = nth;
    failpoint::arm(plan);
    work(mine);
    return true;
  });
  return WIFSIGNALED(wait_for(pid));
}

}  // namespace torchshm::tests
