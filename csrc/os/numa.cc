#include "os/numa.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fstream>
#include <optional>
#include <string_view>

#include "base/failpoint.h"

namespace torchshm::os {
namespace {

constexpr char kOnline[] = "/sys/devices/system/node/online";
constexpr uint32_t kMostNodes = 1024;  // CONFIG_NODES_SHIFT is 10 at most
constexpr char kForms[] = "write it as local, interleave, interleave:0,1, bind:0,1 or preferred:0";

// "0-2,5"
std::optional<std::vector<uint32_t>> parse_nodes(std::string_view text) {
  std::vector<uint32_t> nodes;
  const auto number = [&]() -> std::optional<uint32_t> {
    uint32_t value = 0;
    const auto [stopped, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || value >= kMostNodes) return std::nullopt;
    text.remove_prefix(static_cast<size_t>(stopped - text.data()));
    return value;
  };
  for (;;) {
    const auto first = number();
    if (!first) return std::nullopt;
    auto last = first;
    if (!text.empty() && text.front() == '-') {
      text.remove_prefix(1);
      last = number();
      if (!last || *last < *first) return std::nullopt;
    }
    for (uint32_t node = *first; node <= *last; ++node) nodes.push_back(node);
    if (text.empty()) break;
    if (text.front() != ',') return std::nullopt;
    text.remove_prefix(1);
  }
  std::sort(nodes.begin(), nodes.end());
  nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());
  return nodes;
}

}  // namespace

Result<Numa> parse_numa(const std::string& text) {
  if (text.empty() || text == "local") return Numa{};
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  Numa numa;
  if (name == "interleave") {
    numa.policy = Numa::Policy::kInterleave;
  } else if (name == "bind") {
    numa.policy = Numa::Policy::kBind;
  } else if (name == "preferred") {
    numa.policy = Numa::Policy::kPreferred;
  } else {
    return Status(Code::kInvalid, "numa: no such policy: '" + text + "'; " + kForms);
  }
  std::string online;
  if (std::ifstream file(kOnline); TORCHSHM_INJECT("os.nodes") != 0 || !(file >> online))
    return Status(Code::kUnsupported, "numa='" + text + "': this system's kernel tells of no NUMA nodes (" +
                                          std::string(kOnline) + "); leave numa= out");
  const auto present = parse_nodes(online);
  if (!present) return Status(Code::kUnsupported, std::string(kOnline) + " says '" + online + "'");
  if (colon == std::string::npos) {
    if (numa.policy != Numa::Policy::kInterleave)
      return Status(Code::kInvalid, "numa='" + text + "' names no nodes; " + kForms);
    numa.nodes = *present;
    return numa;
  }
  auto nodes = parse_nodes(std::string_view(text).substr(colon + 1));
  if (!nodes) return Status(Code::kInvalid, "numa: not a list of nodes: '" + text + "'; " + kForms);
  for (const uint32_t node : *nodes) {
    if (!std::binary_search(present->begin(), present->end(), node))
      return Status(Code::kInvalid, "numa='" + text + "': this machine has no node " + std::to_string(node) +
                                        "; those online are " + online);
  }
  if (numa.policy == Numa::Policy::kPreferred && nodes->size() != 1)
    return Status(Code::kInvalid, "numa='" + text + "': one node is preferred, not " + std::to_string(nodes->size()));
  numa.nodes = std::move(*nodes);
  return numa;
}

Status set_policy(std::byte* at, uint64_t length, const Numa& numa) {
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  unsigned long mask[kMostNodes / kBits] = {};
  for (const uint32_t node : numa.nodes) mask[node / kBits] |= 1UL << node % kBits;
  int mode = MPOL_DEFAULT;
  switch (numa.policy) {
    case Numa::Policy::kLocal:
      return {};
    case Numa::Policy::kInterleave:
      mode = MPOL_INTERLEAVE;
      break;
    case Numa::Policy::kBind:
      mode = MPOL_BIND;
      break;
    case Numa::Policy::kPreferred:
      mode = MPOL_PREFERRED;
      break;
  }
  int error = TORCHSHM_INJECT("os.mbind");
  // The kernel takes one bit off the number of bits.
  if (error == 0 && ::syscall(SYS_mbind, at, length, mode, mask, kMostNodes + 1, 0U) != 0) error = errno;
  switch (error) {
    case 0:
      return {};
    case ENOSYS:
      return Status(Code::kUnsupported, "mbind: this kernel has no NUMA policies; leave numa= out", error);
    case EPERM:
      return Status(Code::kUnsupported,
                    "mbind: forbidden here, as in containers without CAP_SYS_NICE (docker run --cap-add SYS_NICE)",
                    error);
    case EINVAL:
      return Status(Code::kUnsupported, "mbind: this process may use none of these nodes (its cpuset)", error);
    default:
      return Status::system("mbind", std::to_string(length) + " bytes", error);
  }
}

}  // namespace torchshm::os
