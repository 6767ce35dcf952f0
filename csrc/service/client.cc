#include "service/client.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>

#include "os/futex.h"
#include "os/process.h"
#include "os/socket.h"
#include "pool/members.h"
#include "service/address.h"
#include "store/backing.h"
#include "store/spill_file.h"

namespace torchshm::service {
namespace {

constexpr int kAnswerWithin = 5000;  // ms; a service answers at once unless it is stopped

struct Answered {
  Reply reply;
  uint32_t served_by = 0;  // user
  std::vector<os::Fd> files;
};

Result<std::unique_ptr<pool::Member>> join(const store::Backing& backing) {
  auto file = backing.share();
  if (!file) return std::move(file.status());
  auto arena = pool::Arena::attach_in(file.take(), backing.regions());
  if (!arena) return std::move(arena.status());
  return pool::Member::over(arena.take());
}

Result<Answered> talk(const std::string& name, Ask ask) {
  if (Status named = check_name(name); !named) return named;
  std::string path;
  Result<os::Fd> socket = Status(Code::kMissing, "");
  for (const std::string& place : places_to_look(name)) {
    auto there = os::connect_to(place);
    if (!path.empty() && !there) break;  // what is wrong with the user's own says more
    path = place;
    socket = std::move(there);
    if (socket || socket.code() != Code::kMissing) break;
  }
  if (!socket) return std::move(socket.status());
  // A socket's name proves nothing: /tmp is everybody's.
  auto peer = os::peer_of(socket->get());
  if (!peer) return std::move(peer.status());
  if (!trusted(path, peer->uid))
    return Status(Code::kInvalid,
                  "the store " + name + " is served by another user, with uid " + std::to_string(peer->uid));
  Request request;
  request.ask = ask;
  if (Status sent = os::send_message(socket->get(), &request, sizeof request); !sent)
    return Status(Code::kMissing, "the store's service has just ended", sent.error());
  Answered answered;
  answered.served_by = peer->uid;
  auto received = os::receive_message(socket->get(), &answered.reply, sizeof answered.reply, kAnswerWithin);
  if (!received) return std::move(received.status());
  if (received->length == 0) return Status(Code::kMissing, "the store's service has just ended");
  if (received->length != sizeof(Reply) || answered.reply.magic != kMagic)
    return Status(Code::kInvalid, "the store " + name + " is served by another version of torchshm");
  answered.reply.why[sizeof answered.reply.why - 1] = 0;
  if (answered.reply.answer != Answer::kOk)
    return Status(Code::kInvalid, "the store " + name + " refuses: " + answered.reply.why);
  answered.files = std::move(received->descriptors);
  return answered;
}

}  // namespace

Result<Reply> ask(const std::string& name, Ask request) {
  auto answered = talk(name, request);
  if (!answered) return std::move(answered.status());
  return answered->reply;
}

Result<Client> connect(const std::string& name, uint64_t nanoseconds, bool (*go_on)()) {
  const uint64_t until = os::boot_time() + nanoseconds;
  auto answered = talk(name, Ask::kAttach);
  // From 1 ms on, twice as long each time.
  for (uint64_t pause = 1'000'000; !answered && answered.code() == Code::kMissing; pause *= 2) {
    const uint64_t now = os::boot_time();
    if (now >= until || !go_on()) return std::move(answered.status());
    std::this_thread::sleep_for(std::chrono::nanoseconds(std::min({pause, until - now, uint64_t{50'000'000}})));
    answered = talk(name, Ask::kAttach);
  }
  if (!answered) return std::move(answered.status());
  const bool persistent = answered->files.size() == 1;
  if (answered->files.size() != 3 && answered->files.size() != 4 && !persistent)
    return Status(Code::kInvalid, "the store's service sent no files");
  std::shared_ptr<store::Backing> backing;
  if (persistent) {
    auto received = store::Backing::receive(std::move(answered->files[0]), answered->served_by);
    if (!received) return std::move(received.status());
    backing = received.take();
  }
  pool::Adoption adoption;
  Client client;
  client.member = pool::find_pool(answered->reply.pool_id);
  if (client.member == nullptr) {
    if (!adoption.room()) return Status(Code::kUnsupported, pool::kTooMany);
    auto member = persistent ? join(*backing)
                             : pool::Member::attach(std::move(answered->files[0]), std::move(answered->files[1]));
    if (!member) return std::move(member.status());
    client.member = adoption.hold(member.take());
  }
  // After the lease was taken: the service may have closed the file since it answered. It looks for leases once more after that.
  if (persistent) backing->touch();
  auto catalogue = persistent ? store::Catalogue::attach_in(*client.member, backing)
                              : store::Catalogue::attach(*client.member, std::move(answered->files[2]));
  if (!catalogue) return std::move(catalogue.status());
  client.catalogue = catalogue.take();
  if (answered->files.size() == 4) {
    auto directory = store::SpillDirectory::join(std::move(answered->files[3]), client.member->pool_id());
    // The service lives, so it has not gone with the store: somebody has removed it. What is in memory can be had all the same.
    if (!directory && directory.code() != Code::kMissing) return std::move(directory.status());
    if (directory) client.catalogue->use(directory.take());
  }
  client.member->add_room_maker(client.catalogue);
  adoption.keep();
  return client;
}

}  // namespace torchshm::service
