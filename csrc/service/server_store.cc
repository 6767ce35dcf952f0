// Which store a service serves: one that is there, in some process's memory or in a file, or one that it makes; and how it leaves it.
#include <algorithm>
#include <filesystem>

#include "base/failpoint.h"
#include "os/lock.h"
#include "os/mapped_file.h"
#include "pool/members.h"
#include "service/address.h"
#include "service/server.h"
#include "store/backing.h"
#include "store/spill_file.h"

namespace torchshm::service {
namespace {

constexpr uint64_t kRoomWithin = 10'000'000'000;  // ns

store::Settings settings_of(const ServerOptions& options) {
  store::Settings settings{options.ttl, place(), options.policy.value_or(store::Policy::kKeep), 0};
  const bool roomy = !options.spill.empty() || options.policy == store::Policy::kDrop;
  settings.patience = options.patience >= 0 ? static_cast<uint64_t>(options.patience) : roomy ? kRoomWithin : 0;
  return settings;
}

// One that is not finished is taken away again.
struct Unfinished {
  store::Backing& backing;
  ~Unfinished() { backing.abandon(); }
};

}  // namespace

Result<Server::Opened> Server::open_memory(const ServerOptions& options, pool::Adoption& adoption) {
  Opened opened;
  auto files = find_files(options.name);
  opened.was_there = files.ok();
  if (opened.was_there) {
    // This process may be one of those that have it.
    const auto stamp = store::Catalogue::stamp_of(files->catalogue.get(), options.name);
    if (stamp) opened.member = pool::find_pool(stamp->pool_id);
  }
  if (opened.member == nullptr) {
    if (!adoption.room()) return Status(Code::kUnsupported, pool::kTooMany);
    auto made = opened.was_there ? pool::Member::attach(std::move(files->data), std::move(files->control))
                                 : pool::Member::create(options.family, options.limits);
    if (!made) return std::move(made.status());
    opened.member = adoption.hold(made.take());
  }
  auto catalogue = opened.was_there ? store::Catalogue::attach(*opened.member, std::move(files->catalogue))
                                    : store::Catalogue::create(*opened.member, options.name, settings_of(options));
  if (!catalogue) return std::move(catalogue.status());
  opened.catalogue = catalogue.take();
  return opened;
}

// `cleaned` is set from when on a start that fails has to leave the file clean.
Result<Server::Opened> Server::open_file(const ServerOptions& options, pool::Adoption& adoption, Cleaned& cleaned) {
  auto found = store::Backing::open(options.file);
  if (!found) return std::move(found.status());
  const std::shared_ptr<store::Backing> backing = found.take();
  const Unfinished unfinished{*backing};
  Opened opened;
  opened.was_there = !backing->fresh();
  auto file = backing->share();
  if (!file) return std::move(file.status());
  if (!opened.was_there) {
    if (!adoption.room()) return Status(Code::kUnsupported, pool::kTooMany);
    auto limit = backing->layout(options.limits.limit);
    if (!limit) return std::move(limit.status());
    auto arena = pool::Arena::create_in(file.take(), backing->regions(), options.family, {*limit, options.limits.warm});
    if (!arena) return std::move(arena.status());
    auto member = pool::Member::over(arena.take());
    if (!member) return std::move(member.status());
    auto catalogue = store::Catalogue::create_in(**member, backing, options.name, settings_of(options));
    if (!catalogue) return std::move(catalogue.status());
    backing->finish((*member)->pool_id());
    opened.member = adoption.hold(member.take());
    opened.catalogue = catalogue.take();
    opened.catalogue->follow_clock();
    return opened;
  }
  // Living clients of a dead service go on with it as it is.
  const bool in_use = backing->in_use();
  if (!in_use) {
    if (backing->damaged_by_power_loss())
      return Status(Code::kCorrupt,
                    options.file +
                        " was in use when the machine went down, and what it has may be older than what was "
                        "acknowledged, or half of it: `torchshm check --repair " +
                        options.file + "` keeps what store.sync() has recorded and is whole");
    if (backing->rebooted()) {
      if (Status forgotten = pool::forget_processes(backing->regions(), file->get()); !forgotten) return forgotten;
      backing->begin_boot();
    }
    // From here on its tables change, names or not. After the boot: else a death in between would pass for a loss of power.
    if (backing->clean()) cleaned.backing = backing;
    backing->touch();
  }
  opened.member = pool::find_pool(backing->superblock().pool_id);
  if (opened.member == nullptr) {
    if (!adoption.room()) return Status(Code::kUnsupported, pool::kTooMany);
    auto arena = pool::Arena::attach_in(file.take(), backing->regions());
    if (!arena) return std::move(arena.status());
    if (!in_use) {
      if (Status reserved = arena->reserve_all(); !reserved) return reserved;
    }
    auto member = pool::Member::over(arena.take());
    if (!member) return std::move(member.status());
    opened.member = adoption.hold(member.take());
  }
  auto catalogue = store::Catalogue::attach_in(*opened.member, backing);
  if (!catalogue) return std::move(catalogue.status());
  opened.catalogue = catalogue.take();
  const std::string name = opened.catalogue->name();
  if (in_use && name != options.name)
    return Status(Code::kExists, options.file + " is the store " + name +
                                     ", which living processes still use under that name: serve it as " + name +
                                     ", or end them first");
  if (!in_use) {
    if (Status reserved = opened.catalogue->reserve_all(); !reserved) return reserved;
    opened.catalogue->rename(options.name, place());
    (void)opened.member->drop_messages();
    (void)opened.catalogue->sweep();
  }
  const pool::Header& header = opened.member->arena().header();
  if (options.limits.limit > header.data_size)
    return Status(Code::kInvalid,
                  options.file + " was made for a limit of " + std::to_string(header.data_size / 2) +
                      " bytes, and twice that is all that it can have: torchshm snapshot copies it into a new file");
  return opened;
}

// Of a store that was there: what was asked for, and no more. Not before the start has succeeded: living clients go by it.
void Server::apply_settings() {
  store::Header& header = catalogue_->header();
  if (options_.ttl != 0) header.default_ttl.store(options_.ttl, std::memory_order_relaxed);
  if (options_.policy) header.policy.store(static_cast<uint32_t>(*options_.policy), std::memory_order_relaxed);
  const bool roomy = options_.policy == store::Policy::kDrop || !catalogue_->directory().empty();
  if (options_.patience >= 0 || (roomy && header.patience.load(std::memory_order_relaxed) == 0))
    header.patience.store(options_.patience >= 0 ? static_cast<uint64_t>(options_.patience) : kRoomWithin,
                          std::memory_order_relaxed);
  if (catalogue_->backing() != nullptr && options_.limits.limit != 0)
    member_.arena().header().limit.store(options_.limits.limit, std::memory_order_relaxed);
}

// Nobody else has it: it was not in use, and the service that would give it to others has not begun.
Server::Cleaned::~Cleaned() {
  if (backing) (void)backing->sync(store::kClean);
}

// The last one to leave writes everything out. The socket is gone already: nobody new comes.
void Server::close_file() {
  store::Backing* const backing = catalogue_->backing();
  if (backing == nullptr) return;
  const int fd = member_.arena().control_fd();
  const uint32_t me = member_.membership().slot();
  // Nor is there another client here, or an array that something may still be written to.
  const auto others = [&] {
    return os::any_locked(fd, 0, me) || os::any_locked(fd, me + 1, pool::kMaxLeases - me - 1);
  };
  if (member_.idle(1) && !others()) {
    (void)backing->sync(store::kClean);
    // One that had its answer while the socket was still there: it may have found the file open.
    if (others()) backing->touch();
  }
  TORCHSHM_POINT("serve.written");
  backing->unlock();
}

Status Server::prepare_spill() {
  std::string path = options_.spill;
  if (path.empty() && took_over_) path = catalogue_->directory();
  if (path.empty()) return {};
  std::error_code error;
  path = std::filesystem::absolute(path, error).lexically_normal().native();
  if (path.size() >= sizeof(store::Header::directory))
    return Status(Code::kInvalid, "the spill directory's path is longer than " +
                                      std::to_string(sizeof(store::Header::directory) - 1) + " bytes");
  // Another directory would leave behind what is in this one.
  if (const std::string had = catalogue_->directory(); !had.empty() && had != path)
    return Status(Code::kInvalid, "this store has values in the spill directory " + had + ": start it with that one");
  (void)store::sweep_dead(path);
  auto directory =
      store::SpillDirectory::make(path, options_.name, member_.pool_id(), false, options_.group,
                                  options_.spill.empty() ? std::nullopt : std::optional<bool>(options_.spill_sync));
  if (!directory) return std::move(directory.status());
  catalogue_->use(directory.take());
  catalogue_->set_directory(path);
  return {};
}

}  // namespace torchshm::service
