// What one process at a time does: Store::get_or_create() and Lock.
#include "store/lock.h"

#include "api/store_impl.h"
#include "os/futex.h"

namespace torchshm {

using api::check_key;
using api::count_of;
using api::fail;
using api::seconds;
using api::time_after;

bool Store::Impl::mark(const std::string& name) {
  const store::SaveOptions bound{false, 0, true};
  Status saved = catalogue->save(name, "", {}, bound);
  if (!saved && saved.code() != Code::kExists) fail(saved);
  return saved.ok();
}

void Store::Impl::wait_for_maker(std::string_view key, const std::string& mark, uint32_t bell, uint64_t timeout,
                                 uint64_t until) {
  auto at_work = catalogue->find(mark);
  if (!at_work) return;
  if (at_work->owner != 0 && member->gone(at_work->owner)) {
    (void)catalogue->sweep();  // the service would do it soon, if there is one
    return;
  }
  const uint64_t now = os::boot_time();
  if (now >= until)
    throw TimeoutError("torchshm: another process has not made '" + std::string(key) + "' within " + seconds(timeout));
  (void)catalogue->wait(key, bell, std::min(until - now, kNap));
}

Array Store::get_or_create(std::string_view key, const std::function<Array()>& make, const MakeOptions& options) const {
  check_key(key);
  const uint64_t timeout = count_of(options.timeout, "a timeout"), until = time_after(timeout);
  (void)count_of(options.ttl, "ttl");
  store::Catalogue& catalogue = *impl_->catalogue;
  const std::string mark = std::string(1, '\0').append(key);  // Python puts up the same
  for (;;) {
    const uint32_t bell = catalogue.bell(key);
    try {
      return load(key, {options.mode, Nanoseconds{0}});
    } catch (const KeyError&) {
    }
    if (!impl_->mark(mark)) {
      impl_->wait_for_maker(key, mark, bell, timeout, until);
      continue;
    }
    const std::shared_ptr<void> marked(&catalogue, [&](void*) {
      (void)catalogue.remove(mark);
      catalogue.ring(key);
    });
    if (catalogue.contains(key)) continue;  // it may have come before the mark
    const Array made = make();
    try {
      save(key, made, {false, options.ttl});
    } catch (const KeyExistsError&) {
      // Saved by somebody else, without asking: theirs it is.
    }
  }
}

struct Lock::Impl {
  store::Lock lock;
};

Lock::Lock(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Lock::Lock(Lock&& from) noexcept = default;
Lock& Lock::operator=(Lock&& from) noexcept = default;
Lock::~Lock() = default;

bool Lock::held() const { return impl_ != nullptr && impl_->lock.held(); }

void Lock::release() {
  if (impl_ != nullptr && impl_->lock.left_to_parent())
    throw Error(
        "torchshm: the lock is held by the process that this one was forked from, so it can't be released here");
  if (Status done = impl_ == nullptr ? Status(Code::kMissing, "the lock is not held") : impl_->lock.release(); !done)
    throw Error("torchshm: " + done.what());
}

Lock Store::lock(std::string_view key, bool shared, Nanoseconds timeout) const {
  if (!key.empty()) check_key(key);
  const uint64_t most = count_of(timeout, "a timeout"), until = time_after(most);
  store::Catalogue& catalogue = *impl_->catalogue;
  Lock made(std::unique_ptr<Lock::Impl>(new Lock::Impl{store::Lock(impl_->catalogue, key)}));
  store::Lock& lock = made.impl_->lock;
  for (;;) {
    const uint32_t bell = catalogue.bell(lock.bell());
    const auto taken = lock.try_acquire(shared);
    if (!taken) fail(taken.status());
    if (*taken) return made;
    const uint64_t now = os::boot_time();
    if (now >= until)
      throw TimeoutError("torchshm: somebody else has held the lock of " +
                         (key.empty() ? "the store " + name() : "'" + std::string(key) + "'") + " for " +
                         seconds(most));
    (void)catalogue.wait(lock.bell(), bell, std::min(until - now, kNap));
  }
}

}  // namespace torchshm
