// A store's service: gives new clients the store's files, and tidies up. Loading and saving go on without it.
//
// Private: one thread, which touches neither Python nor the program's memory; sockets. Shared: through member and catalogue.
// When its process dies: clients keep what they have and go on; a new service of the same name takes the store over from any of them.
// A forked child has no service, and closes the parent's sockets.
#pragma once

#include <atomic>
#include <latch>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "base/status.h"
#include "os/fd.h"
#include "os/socket.h"
#include "pool/member.h"
#include "pool/members.h"
#include "store/catalogue.h"

namespace torchshm::service {

struct ServerOptions {
  std::string name;
  pool::Limits limits;
  uint64_t family = 0;
  uint64_t ttl = 0;      // ns; of names that are saved without one; 0: none
  uint32_t mode = 0600;  // of the socket
  int64_t group = -1;    // whose members may connect as well
  std::string
      spill;  // directory for what does not fit into memory; empty: none, or the one that a store taken over has
  std::optional<store::Policy> policy;  // of names that are saved without one; nothing: kKeep, or what the store has
  bool spill_sync = true;  // with `spill`: memory is given up when the disk has the file, else when the kernel has it
  int64_t patience = -1;  // ns that saving and loading wait for room; -1: ten seconds where room can be made, else none
  std::string file;       // of a persistent store; empty: in memory
};

class Server {
 public:
  // kExists when a store of that name, or of that file, is being served. Takes over the store of that name that some living process still has.
  // One that fails leaves nothing here, and no file.
  static Result<std::unique_ptr<Server>> start(const ServerOptions& options);
  // Ends the service and removes its socket; the store lives on in its clients.
  ~Server();

  pool::Member& member() { return member_; }
  store::Catalogue& catalogue() { return *catalogue_; }
  std::shared_ptr<store::Catalogue> share_catalogue() const { return catalogue_; }  // outlives the service
  // Whether the store was there before: some living process had it, or it was in the file.
  bool took_over() const { return took_over_; }
  // The service ends when a client asks for that, too.
  // Waits until somebody asks the service to stop, for `milliseconds` at most. True when it has been asked.
  bool wait(int milliseconds);
  void ask_to_stop();

  // For fork handlers.
  void forget_in_child();

 private:
  Server(const ServerOptions& options, pool::Member& member);
  struct Opened {
    pool::Member* member = nullptr;
    std::shared_ptr<store::Catalogue> catalogue;
    bool was_there = false;
  };
  static Result<Opened> open_memory(const ServerOptions& options, pool::Adoption& adoption);
  // A file that was clean, until the start is over: one that fails leaves it so.
  struct Cleaned {
    std::shared_ptr<store::Backing> backing;
    ~Cleaned();
  };
  static Result<Opened> open_file(const ServerOptions& options, pool::Adoption& adoption, Cleaned& cleaned);
  void close_file();
  void apply_settings();
  void run();
  void accept_clients();
  void serve(int socket);
  bool welcome(const os::Peer& peer) const;
  void tidy();
  Status prepare_spill();
  void write_ahead();

  ServerOptions options_;
  std::string socket_path_, lock_path_;  // as they were at the start, whatever becomes of the environment
  pool::Member& member_;
  std::shared_ptr<store::Catalogue> catalogue_;
  os::Fd lock_, listening_, signal_;
  os::Poller poller_;
  std::thread thread_;
  std::thread writer_;              // of values that memory may soon be too small for; where there is a directory
  std::atomic<bool> deaths_{true};  // files may have been left
  std::latch begin_{1};             // the start is over
  std::atomic<bool> ending_{false};
  std::atomic<uint32_t> stop_asked_{0};
  std::atomic<uint64_t> clients_{0};
  uint64_t started_ = 0;
  bool took_over_ = false;
  struct Connections;
  std::unique_ptr<Connections> connections_;
};

}  // namespace torchshm::service
