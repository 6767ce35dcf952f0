// torchshmd: serves a store in the foreground until SIGTERM or Ctrl-C, as `torchshm serve --no-fork` does, without Python.
//
// Exit codes: 0 done; 1 it can't be served; 2 wrong usage. When it dies otherwise: the store lives on in its clients, and the next one of
// that name takes it over from them.
#include <getopt.h>
#include <grp.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "torchshm/store.h"

namespace {

constexpr char kUsage[] =
    "Usage: torchshmd --name NAME [--limit SIZE] [--ttl TIME] [--mode OCTAL] [--group GROUP]\n"
    "                 [--spill DIR] [--no-spill-sync] [--policy POLICY] [--timeout TIME] [--file PATH]\n"
    "                 [--hugepages KIND] [--prefault] [--numa POLICY] [--json]\n"
    "\n"
    "Serve a store, in the foreground, until SIGTERM, Ctrl-C or `torchshm stop NAME`.\n"
    "\n"
    "  --name NAME    The store's name: 1 to 63 letters, digits, '.', '_' and '-'.\n"
    "  --limit SIZE   Most memory, as in 8GiB or 25%. Default: half of the machine's.\n"
    "  --ttl TIME     How long names live, as in 90s, 15m, 2h or 1d. Default: for ever.\n"
    "  --mode OCTAL   Permissions of the socket. Default: 0600.\n"
    "  --group GROUP  Its members, by name or number, may use the store; with --mode 0660.\n"
    "  --spill DIR    On a disk: where values go that do not fit into memory.\n"
    "  --no-spill-sync\n"
    "                 Give memory up when the kernel has the file, not the disk: faster.\n"
    "  --policy P     What may become of values when room is needed: keep (to disk), spill (to disk first), drop\n"
    "                 (removed), pin (nothing). Default: keep.\n"
    "  --timeout TIME How long savers and loaders wait for room. Default: 10s where it can be made.\n"
    "  --file PATH    Keep the store in this file, which outlives its processes. Default: in memory.\n"
    "  --hugepages KIND\n"
    "                 auto (the default): transparent ones; never; 2MiB: those that are reserved.\n"
    "  --prefault     Take the memory up to the limit at the start.\n"
    "  --numa POLICY  Nodes to put memory on: local (the default), interleave, bind:0,1, preferred:0.\n"
    "  --json         Write JSON.\n"
    "  --help         Write this.\n"
    "\n"
    "Exit codes: 0 done; 1 the store can't be served; 2 wrong usage.\n";

constexpr double kMost = 9e18;  // bytes or nanoseconds; above, they do not fit

struct Options {
  std::string name;
  torchshm::StartOptions start;
  bool json = false;
};

volatile std::sig_atomic_t ended = 0;
void end(int) { ended = 1; }

// The number in front, and what follows it.
std::optional<double> number_in(std::string_view text, std::string_view& unit) {
  double number = 0;
  const char* last = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), last, number, std::chars_format::fixed);
  if (error != std::errc()) return std::nullopt;
  unit = {stopped, static_cast<size_t>(last - stopped)};
  return number;
}

std::optional<uint64_t> parse_limit(std::string_view text) {
  std::string_view unit;
  auto size = number_in(text, unit);
  if (!size || !(*size >= 0)) return std::nullopt;
  while (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  if (unit == "%") {
    const auto allowed = static_cast<double>(torchshm::memory_allowed());
    if (!(*size > 0) || *size > 100 || allowed > kMost) return std::nullopt;
    return std::max<uint64_t>(static_cast<uint64_t>(allowed * *size / 100), 1);
  }
  if (!unit.empty() && (unit.back() == 'B' || unit.back() == 'b')) unit.remove_suffix(1);
  double step = 1000;
  if (!unit.empty() && (unit.back() == 'i' || unit.back() == 'I')) {
    step = 1024;
    unit.remove_suffix(1);
    if (unit.empty()) return std::nullopt;
  }
  if (!unit.empty()) {
    constexpr std::string_view kUnits = "kmgt";
    const size_t power = kUnits.find(static_cast<char>(unit.front() | 0x20));
    if (unit.size() != 1 || power == std::string_view::npos) return std::nullopt;
    for (size_t i = 0; i <= power; ++i) *size *= step;
  }
  if (!(*size >= 1) || *size > kMost) return std::nullopt;
  return static_cast<uint64_t>(*size);
}

std::optional<torchshm::Nanoseconds> parse_time(std::string_view text) {
  std::string_view unit;
  auto seconds = number_in(text, unit);
  if (!seconds) return std::nullopt;
  if (unit == "m") {
    *seconds *= 60;
  } else if (unit == "h") {
    *seconds *= 3600;
  } else if (unit == "d") {
    *seconds *= 86400;
  } else if (!unit.empty() && unit != "s") {
    return std::nullopt;
  }
  const double ns = *seconds * 1e9;
  if (!(ns >= 1) || ns > kMost) return std::nullopt;
  return torchshm::Nanoseconds(static_cast<int64_t>(ns));
}

template <class T>
bool whole(std::string_view text, int base, T& to) {
  const auto [stopped, error] = std::from_chars(text.data(), text.data() + text.size(), to, base);
  return !text.empty() && error == std::errc() && stopped == text.data() + text.size();
}

[[noreturn]] void wrong(const std::string& why) {
  std::fprintf(stderr, "torchshmd: %s\n\n%s", why.c_str(), kUsage);
  std::exit(2);
}

Options parse(int count, char** arguments) {
  static const option known[] = {
      {"name", required_argument, nullptr, 'n'},   {"limit", required_argument, nullptr, 'l'},
      {"ttl", required_argument, nullptr, 't'},    {"mode", required_argument, nullptr, 'm'},
      {"group", required_argument, nullptr, 'g'},  {"json", no_argument, nullptr, 'j'},
      {"spill", required_argument, nullptr, 's'},  {"no-spill-sync", no_argument, nullptr, 'S'},
      {"policy", required_argument, nullptr, 'p'}, {"timeout", required_argument, nullptr, 'w'},
      {"help", no_argument, nullptr, 'h'},         {"hugepages", required_argument, nullptr, 'H'},
      {"prefault", no_argument, nullptr, 'P'},     {"file", required_argument, nullptr, 'f'},
      {"numa", required_argument, nullptr, 'u'},   {nullptr, 0, nullptr, 0}};
  Options options;
  bool named = false;
  opterr = 0;
  for (int c = 0; (c = ::getopt_long(count, arguments, ":", known, nullptr)) != -1;) {
    const std::string given = optarg == nullptr ? "" : optarg;
    switch (c) {
      case 'n':
        options.name = given;
        named = true;
        break;
      case 'l':
        if (const auto size = parse_limit(given)) {
          options.start.limit = *size;
        } else {
          wrong("not a size: '" + given + "'; write it as 256MiB, 8GB, a number of bytes, or 25%");
        }
        break;
      case 't':
        if (const auto time = parse_time(given)) {
          options.start.ttl = *time;
        } else {
          wrong("not a time: '" + given + "'; write it as 90s, 15m, 2h or 1d");
        }
        break;
      case 'm':
        if (!whole(given, 8, options.start.mode) || options.start.mode > 0777)
          wrong("not permissions: '" + given + "'; write them as 0660");
        break;
      case 'g':
        if (uint32_t id = 0; whole(given, 10, id)) {
          options.start.group = id;
        } else if (const ::group* entry = ::getgrnam(given.c_str())) {
          options.start.group = entry->gr_gid;
        } else {
          wrong("no group named '" + given + "'");
        }
        break;
      case 's':
        options.start.spill = given;
        break;
      case 'S':
        options.start.spill_sync = false;
        break;
      case 'p': {
        constexpr std::string_view kPolicies[] = {"keep", "drop", "spill", "pin"};
        const auto* found = std::find(std::begin(kPolicies), std::end(kPolicies), given);
        if (found == std::end(kPolicies)) wrong("not a policy: '" + given + "'; write keep, drop, spill or pin");
        options.start.policy = static_cast<torchshm::Policy>(found - kPolicies);
        break;
      }
      case 'w':
        if (const auto time = parse_time(given)) {
          options.start.timeout = *time;
        } else {
          wrong("not a time: '" + given + "'; write it as 90s, 15m, 2h or 1d");
        }
        break;
      case 'f':
        options.start.file = given;
        break;
      case 'H':
        options.start.hugepages = given;
        break;
      case 'P':
        options.start.prefault = true;
        break;
      case 'u':
        options.start.numa = given;
        break;
      case 'j':
        options.json = true;
        break;
      case 'h':
        std::fputs(kUsage, stdout);
        std::exit(0);
      case ':':
        wrong(std::string(arguments[optind - 1]) + " takes a value");
      default:
        wrong("no such option: " + std::string(arguments[optind - 1]));
    }
  }
  if (optind < count) wrong("what is '" + std::string(arguments[optind]) + "'?");
  if (!named) wrong("which store? Give its --name");
  return options;
}

}  // namespace

int main(int count, char** arguments) {
  const Options options = parse(count, arguments);
  // From here on a signal ends the service cleanly, and not in the middle of its start.
  struct sigaction action = {};
  action.sa_handler = end;
  for (const int signal : {SIGTERM, SIGINT}) ::sigaction(signal, &action, nullptr);
  try {
    const auto store = torchshm::Store::start(options.name, options.start);
    const int pid = static_cast<int>(::getpid());
    if (options.json) {
      std::printf("{\"name\": \"%s\", \"pid\": %d, \"took_over\": %s}\n", options.name.c_str(), pid,
                  store.took_over() ? "true" : "false");
    } else {
      std::printf("Serving the store %s as process %d.\n", options.name.c_str(), pid);
    }
    std::fflush(stdout);
    while (ended == 0 && !store.wait_for_stop(std::chrono::milliseconds(200))) {
    }
    return 0;
  } catch (const std::exception& error) {
    constexpr std::string_view kPrefix = "torchshm: ";  // of the library's errors
    std::string_view why = error.what();
    if (why.substr(0, kPrefix.size()) == kPrefix) why.remove_prefix(kPrefix.size());
    std::fprintf(stderr, "torchshmd: %.*s\n", static_cast<int>(why.size()), why.data());
    return 1;
  }
}
