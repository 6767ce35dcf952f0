// torchshm::Store itself: how it begins and ends, its names, and its figures.
#include <algorithm>
#include <stdexcept>

#include "api/store_impl.h"
#include "os/futex.h"
#include "os/memory.h"
#include "service/address.h"
#include "service/client.h"

namespace torchshm {

using api::check_key;
using api::count_of;
using api::fail;

uint64_t memory_allowed() { return os::memory_allowed(); }

Store::Store(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Store Store::start(const std::string& name, const StartOptions& options) {
  if (Status named = service::check_name(name); !named) fail(named);
  service::ServerOptions how;
  how.name = name;
  how.limits.limit = options.limit;
  auto pages = pool::parse_pages(options.hugepages, options.prefault, options.numa);
  if (pages.code() == Code::kInvalid) throw std::invalid_argument("torchshm: " + pages.status().what());
  if (!pages) fail(pages.status());
  how.limits.pages = pages.take();
  how.ttl = count_of(options.ttl, "ttl");
  how.mode = options.mode;
  how.file = options.file;
  how.group = options.group ? static_cast<int64_t>(*options.group) : -1;
  how.spill = options.spill;
  how.spill_sync = options.spill_sync;
  if (options.policy) how.policy = static_cast<store::Policy>(*options.policy);
  if (options.timeout)
    how.patience = static_cast<int64_t>(std::min<uint64_t>(count_of(*options.timeout, "a timeout"), INT64_MAX));
  auto server = service::Server::start(how);
  if (server.code() == Code::kInvalid) throw Error("torchshm: " + server.status().what());
  if (!server) fail(server.status());
  auto impl = std::make_shared<Impl>();
  impl->name = name;
  impl->server = server.take();
  impl->member = &impl->server->member();
  impl->catalogue = impl->server->share_catalogue();
  impl->took_over = impl->server->took_over();
  return Store(std::move(impl));
}

Store Store::connect(const std::string& name, Nanoseconds timeout) {
  if (Status named = service::check_name(name); !named) fail(named);
  auto client = service::connect(name, count_of(timeout, "a timeout"), [] { return true; });
  if (client.code() == Code::kMissing || client.code() == Code::kInvalid)
    throw StoreUnavailableError("torchshm: no store named " + name + ": " + client.status().what() +
                                ". Start one with torchshm::Store::start(), or `torchshmd --name " + name +
                                "`, as the same user");
  if (!client) fail(client.status());
  auto impl = std::make_shared<Impl>();
  impl->name = name;
  impl->member = client->member;
  impl->catalogue = client->catalogue;
  return Store(std::move(impl));
}

bool Store::contains(std::string_view key) const {
  check_key(key);
  return impl_->catalogue->contains(key);
}

bool Store::remove(std::string_view key) const {
  check_key(key);
  return impl_->catalogue->remove(key);
}

std::vector<std::string> Store::keys(std::string_view prefix) const { return impl_->catalogue->keys(prefix); }

uint64_t Store::size() const { return impl_->catalogue->size(); }

KeyInfo Store::info(std::string_view key) const {
  check_key(key);
  const store::Entry entry = impl_->find(key, 0);
  KeyInfo info;
  const char kind = entry.text.empty() ? '\0' : entry.text[0];
  info.kind = kind == 'A' ? "array" : kind == 'J' ? "values" : kind == 'P' ? "object" : "unknown";
  for (const auto& block : entry.blocks) {
    if (const auto extent = impl_->member->arena().extent(block.block)) info.bytes += extent->length;
  }
  if (entry.spilled) info.bytes = entry.bytes;
  info.on_disk = entry.spilled;
  info.policy = static_cast<Policy>(entry.policy);
  info.blocks = entry.blocks.size();
  info.created = std::chrono::system_clock::time_point(
      std::chrono::duration_cast<std::chrono::system_clock::duration>(Nanoseconds(entry.created)));
  if (entry.expires != 0)
    info.expires_in = Nanoseconds(static_cast<int64_t>(entry.expires) - static_cast<int64_t>(impl_->catalogue->now()));
  info.pid = entry.pid;
  return info;
}

StoreInfo Store::info() const {
  const store::Header& header = impl_->catalogue->header();
  const pool::Stats stats = impl_->member->stats();
  StoreInfo info;
  info.name = impl_->name;
  info.names = impl_->catalogue->size();
  info.live_bytes = stats.live;
  info.committed_bytes = stats.committed;
  info.limit_bytes = stats.limit;
  // Figures: no order between them is meant.
  info.saved = header.saved.load(std::memory_order_relaxed);
  info.removed = header.removed.load(std::memory_order_relaxed);
  info.expired = header.expired.load(std::memory_order_relaxed);
  info.service_pid = header.serving.load(std::memory_order_relaxed);
  return info;
}

std::string Store::name() const { return impl_->name; }
bool Store::serving() const { return impl_->service() != nullptr; }
bool Store::took_over() const { return impl_->took_over; }

bool Store::wait_for_stop(Nanoseconds timeout) const {
  const auto server = impl_->service();
  if (server == nullptr) return true;
  const uint64_t milliseconds = count_of(timeout, "a timeout") / 1'000'000;
  return server->wait(static_cast<int>(std::min<uint64_t>(milliseconds, INT32_MAX)));
}

void Store::stop() const {
  std::shared_ptr<service::Server> ended;
  {
    const std::lock_guard held(impl_->ending);
    ended.swap(impl_->server);
  }
}

}  // namespace torchshm
