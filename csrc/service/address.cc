#include "service/address.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "os/memfd.h"
#include "os/process.h"
#include "os/socket.h"
#include "pool/arena.h"
#include "store/catalogue.h"

namespace torchshm::service {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSocketEnding = ".sock";
constexpr const char* kOfRoot = "/run/torchshm";

// Where in /proc/<pid>/fd a memory file of that name is; empty when the process has none.
fs::path descriptor_of(const fs::path& process, const std::string& file) {
  std::error_code error;
  const std::string wanted = "/memfd:" + file + " (deleted)";
  for (fs::directory_iterator at(process / "fd", error), end; !error && at != end; at.increment(error)) {
    std::error_code unread;
    const fs::path target = fs::read_symlink(at->path(), unread);
    if (!unread && target.native() == wanted) return at->path();
  }
  return {};
}

}  // namespace

Status check_name(const std::string& name) {
  const bool plain = std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
           c == '-';
  });
  if (plain && !name.empty() && name.size() < 64 && name[0] != '.') return {};
  return Status(Code::kInvalid,
                "a store's name has 1 to 63 letters, digits, '.', '_' or '-', and does not begin with a '.'");
}

std::string directory() {
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR"); runtime != nullptr && *runtime == '/')
    return std::string(runtime) + "/torchshm";
  const uint32_t uid = os::effective_user();
  return uid == 0 ? kOfRoot : "/tmp/torchshm-" + std::to_string(uid);
}

std::string socket_path(const std::string& name) { return directory() + "/" + name + kSocketEnding; }
std::vector<std::string> places_to_look(const std::string& name) {
  std::vector<std::string> paths = {socket_path(name)};
  if (directory() != kOfRoot) paths.push_back(std::string(kOfRoot) + "/" + name + kSocketEnding);
  return paths;
}

bool trusted(const std::string& path, uint32_t uid) {
  if (uid == os::effective_user() || uid == 0) return true;
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  return runtime != nullptr && *runtime == '/' && path == socket_path(fs::path(path).stem().native()) &&
         os::only_writer(runtime, uid) && os::only_writer(directory(), uid);
}

std::string lock_path(const std::string& name) { return directory() + "/" + name + ".lock"; }

std::vector<std::string> names() {
  std::vector<std::string> found;
  std::error_code error;
  for (fs::directory_iterator at(directory(), error), end; !error && at != end; at.increment(error)) {
    if (at->path().extension() == kSocketEnding) found.push_back(at->path().stem().native());
  }
  std::sort(found.begin(), found.end());
  return found;
}

uint64_t place() { return os::identity_of(directory()); }

Result<Files> find_files(const std::string& name) {
  const uint64_t here = place();
  Files best;
  uint64_t created = 0;
  std::error_code error;
  for (fs::directory_iterator at("/proc", error), end; !error && at != end; at.increment(error)) {
    const std::string entry = at->path().filename().native();
    if (!std::all_of(entry.begin(), entry.end(), [](char c) { return c >= '0' && c <= '9'; })) continue;
    const fs::path place = descriptor_of(at->path(), store::Catalogue::file_name(name));
    if (place.empty()) continue;
    auto catalogue = os::open_memfd(place);
    if (!catalogue) continue;
    const auto stamp = store::Catalogue::stamp_of(catalogue->get(), name);
    if (!stamp || stamp->place != here || stamp->created <= created) continue;
    auto control = os::open_memfd(descriptor_of(at->path(), pool::control_file_name(stamp->pool_id)));
    auto data = os::open_memfd(descriptor_of(at->path(), pool::data_file_name(stamp->pool_id)));
    if (!control || !data) continue;
    best = Files{data.take(), control.take(), catalogue.take()};
    created = stamp->created;
  }
  if (created == 0) return Status(Code::kMissing, "no living process has the store " + name);
  return best;
}

}  // namespace torchshm::service
