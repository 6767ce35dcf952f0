// A memory file and a mapping of it, for tests.
#pragma once

#include <gtest/gtest.h>

#include "os/mapping.h"
#include "os/memfd.h"

namespace torchshm::tests {

constexpr uint64_t kSize = uint64_t{4} << 20;

inline os::Fd memfd(uint64_t size = kSize) {
  auto fd = os::create_memfd("torchshm-test", size);
  EXPECT_TRUE(fd.ok()) << fd.status().what();
  return fd.take();
}

inline os::Mapping map(os::Mapping::Kind kind, const os::Fd& fd, uint64_t size = kSize) {
  auto mapping = os::Mapping::map(kind, fd.get(), size);
  EXPECT_TRUE(mapping.ok()) << mapping.status().what();
  return mapping.take();
}

}  // namespace torchshm::tests
