// Every operation of a store's service and of its clients on it; see points_operations.cc.
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "service/client.h"
#include "service/server.h"
#include "store_points_names.h"

namespace torchshm::torture {
namespace {

using service::Ask;
using service::Server;

constexpr uint64_t kPatience = 10'000'000'000, kShort = 20'000'000;

bool always() { return true; }

service::ServerOptions options(const std::string& name) {
  service::ServerOptions options;
  options.name = name;
  options.limits.limit = kLimit;
  options.limits.warm = uint64_t{1} << 40;
  return options;
}

// What the process that an operation is killed in has; one operation a process.
std::unique_ptr<Server> serving;
pid_t partner = -1;
int told[2] = {-1, -1};

Status start(Scene& s, const std::string& name, bool must_take_over) {
  auto started = Server::start(options(name));
  if (!started) return std::move(started.status());
  serving = started.take();
  if (must_take_over && !serving->took_over()) s.wrong("the service began anew, with the store there");
  return {};
}

// A client: loads a name that is there, or is told why it can't.
int visit(uint64_t nanoseconds, const char* key) {
  auto client = service::connect(store_name(), nanoseconds, always);
  if (!client) {
    expected->refused = 1;
    return client.status().what().empty() ? 1 : 0;
  }
  Scene self(-1, -1);
  self.member = client->member;
  self.names = client->catalogue;
  const bool fine = get(self, key) != kMissing && self.fine();
  self.names.reset();
  return fine ? 0 : 1;
}

// Who is not taken from the service's queue waits for seconds. Where that is a fault's doing it is enough to see that it goes on.
int wait_a_while(pid_t pid) {
  int status = 0;
  for (int i = 0; i < 60 && here.run == Run::kFail; ++i) {
    if (::waitpid(pid, &status, WNOHANG) == pid) return status;
    ::usleep(1000);
  }
  if (here.run != Run::kFail || here.board->acted[here.level].load() == 0) return wait_for(pid);
  ::kill(pid, SIGKILL);
  (void)wait_for(pid);
  expected->refused = 1;
  return 0;
}

}  // namespace

std::string startable(Scene&, const std::string& name) {
  const int status = wait_for(begin([&] {
    auto server = Server::start(options(name));
    if (!server) {
      say(here.board->wrong, "no service can be started: %s", server.status().what().c_str());
      return 1;
    }
    if (!(*server)->took_over()) say(here.board->wrong, "a service began anew, with the store there");
    auto client = service::connect(name, kPatience, always);
    if (!client) say(here.board->wrong, "the service started does not answer: %s", client.status().what().c_str());
    return client && (*server)->took_over() ? 0 : 1;
  }));
  if (status == 0) return "";
  return here.board->wrong[0] != 0 ? here.board->wrong
                                   : "starting a service ended with status " + std::to_string(status);
}

void add_service(std::vector<Operation>& all) {
  const auto add = [&](const char* name, uint32_t flags, std::function<void(Scene&)> prepare,
                       std::function<Status(Scene&)> act) {
    all.push_back({name, flags | kOwn | kNoMember | kAdopts, std::move(prepare), std::move(act)});
  };
  const auto nothing = [](Scene&) {};
  add("take_over", 0, nothing, [](Scene& s) {
    Status started = start(s, store_name(), true);
    if (!started) return started;
    s.member = &serving->member();
    serving.reset();
    return Status();
  });
  add("serve_another", 0, nothing, [](Scene& s) {
    Status started = start(s, store_name() + "-another", false);
    serving.reset();
    return started;
  });
  // The service, killed and the like while it serves somebody, sees that one die, and ends.
  add(
      "serve", 0,
      [](Scene& s) {
        if (::pipe(told) != 0) return s.wrong("pipe");
        partner = begin([] {
          ::close(told[1]);
          char byte = 0;
          if (::read(told[0], &byte, 1) != 1) return 0;  // the other end has died before it came to that
          return visit(kShort, "kept/many");
        });
        ::close(told[0]);
        if (Status started = start(s, store_name(), true); !started) return s.wrong("%s", started.what().c_str());
        s.member = &serving->member();
      },
      [](Scene& s) {
        (void)!::write(told[1], "x", 1);
        const int status = wait_a_while(partner);
        const bool faulted = here.board->acted[here.level].load() != 0;
        if (status != 0 || (expected->refused != 0 && !faulted))
          s.wrong("a client ended with status %d%s", status, expected->refused != 0 ? ", refused" : "");
        // Until it has seen that.
        for (int i = 0; i < 100; ++i) {
          auto reply = service::ask(store_name(), Ask::kInfo);
          if (!reply || reply->clients == 0) break;
          ::usleep(200);
        }
        serving.reset();
        return Status();
      });
  // A client, with a service in another process.
  add(
      "connect", 0,
      [](Scene& s) {
        partner = begin([] {
          ::prctl(PR_SET_PDEATHSIG, SIGKILL);
          Scene self(-1, -1);
          if (!start(self, store_name(), true)) return 1;
          while (!serving->wait(1000)) {
          }
          serving.reset();
          return self.fine() ? 0 : 1;
        });
        for (int i = 0; i < 5000 && !service::ask(store_name(), Ask::kInfo); ++i) ::usleep(1000);
        if (!service::ask(store_name(), Ask::kInfo)) s.wrong("the service does not answer");
      },
      [](Scene& s) {
        auto client = service::connect(store_name(), kShort, always);
        Status status = client ? Status() : std::move(client.status());
        if (client) {
          s.member = client->member;
          s.names = client->catalogue;
          if (get(s, "kept/one") == kMissing) s.wrong("a name that is there is missing");
        }
        const bool stopped = service::ask(store_name(), Ask::kStop).ok();
        failpoint::disarm();
        if (!stopped) ::kill(partner, SIGKILL);
        const int ended = wait_for(partner);
        if (stopped && ended != 0) s.wrong("the service ended with status %d", ended);
        // What is said of a service that ends just now, or never was.
        if (status.code() == Code::kMissing || status.code() == Code::kInvalid)
          status = Status(Code::kSystem, status.what(), status.error());
        return status;
      });
  add("connect_to_nobody", 0, nothing, [](Scene& s) {
    auto client = service::connect(store_name() + "-nobody", 1'000'000, always);
    if (client) s.wrong("connected to nobody");
    if (client.code() != Code::kMissing && here.board->acted[here.level].load() == 0)
      s.wrong("connecting to nobody: %s", client.status().what().c_str());
    return Status();
  });
}

}  // namespace torchshm::torture
