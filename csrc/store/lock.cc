#include "store/lock.h"

#include <pthread.h>

#include <mutex>
#include <unordered_set>

#include "os/lock.h"

namespace torchshm::store {
namespace {

// Beyond the end of any file, and the highest that a record lock can name is below twice this.
constexpr uint64_t kFirstByte = uint64_t{1} << 62;

// Held from before a description is opened until it is in the list, so that no fork comes in between.
std::mutex changing;
std::unordered_set<Lock*>& held_here() {
  static auto* locks = new std::unordered_set<Lock*>;
  return *locks;
}

void in_child() {
  for (Lock* lock : held_here()) lock->forget_in_child();
  held_here().clear();
  changing.unlock();
}

void hook_forks() {
  static const int hooked = ::pthread_atfork([] { changing.lock(); }, [] { changing.unlock(); }, in_child);
  (void)hooked;
}

}  // namespace

Lock::Lock(std::shared_ptr<Catalogue> catalogue, std::string_view key)
    : catalogue_(std::move(catalogue)), name_(std::string("\0lock", 5).append(key)) {
  byte_ = kFirstByte | (Catalogue::hash(name_) & (kFirstByte - 1));
  hook_forks();
}

Lock::~Lock() {
  const std::lock_guard guard(changing);
  if (description_.valid()) (void)let_go();
}

Result<bool> Lock::try_acquire(bool shared) {
  const std::lock_guard guard(changing);
  if (description_.valid()) return false;
  auto description = catalogue_->reopen();
  if (!description) return std::move(description.status());
  auto locked = os::try_lock(description->get(), byte_, shared);
  if (!locked || !*locked) return locked;
  description_ = description.take();
  left_to_parent_ = false;
  held_here().insert(this);
  return true;
}

// The byte is unlocked by name: a copy that a child has would keep it.
Status Lock::let_go() {
  held_here().erase(this);
  os::Fd description = std::move(description_);
  if (!catalogue_->is_file(description.get())) {
    (void)description.release();  // by now it may be somebody else's
    return Status(Code::kSystem, "this process has closed its descriptors, and so the lock was given up before");
  }
  Status done = os::unlock(description.get(), byte_);
  description.reset();
  catalogue_->ring(name_);
  return done;
}

Status Lock::release() {
  const std::lock_guard guard(changing);
  if (!description_.valid()) return Status(Code::kMissing, "the lock is not held");
  return let_go();
}

bool Lock::held() const {
  const std::lock_guard guard(changing);
  return description_.valid();
}

bool Lock::left_to_parent() const {
  const std::lock_guard guard(changing);
  return left_to_parent_;
}

void Lock::forget_in_child() {
  if (catalogue_->is_file(description_.get())) {
    description_.reset();  // not unlocked: the parent has the same description
  } else {
    (void)description_.release();
  }
  left_to_parent_ = true;
}

}  // namespace torchshm::store
