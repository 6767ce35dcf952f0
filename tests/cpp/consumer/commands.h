// A program that does what the lines on its standard input say, and answers each with one line, until the input ends.
#pragma once

#include <torchshm/store.h>

#include <cstdio>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

using Command = std::function<std::string(std::istringstream& arguments)>;

inline const char* kind_of(const std::exception& error) {
  if (dynamic_cast<const torchshm::KeyError*>(&error) != nullptr) return "KeyError";
  if (dynamic_cast<const torchshm::KeyExistsError*>(&error) != nullptr) return "KeyExistsError";
  if (dynamic_cast<const torchshm::PoolFullError*>(&error) != nullptr) return "PoolFullError";
  if (dynamic_cast<const torchshm::StoreUnavailableError*>(&error) != nullptr) return "StoreUnavailableError";
  if (dynamic_cast<const torchshm::TimeoutError*>(&error) != nullptr) return "TimeoutError";
  if (dynamic_cast<const torchshm::TypeError*>(&error) != nullptr) return "TypeError";
  if (dynamic_cast<const torchshm::Error*>(&error) != nullptr) return "Error";
  if (dynamic_cast<const std::invalid_argument*>(&error) != nullptr) return "invalid_argument";
  return "other";
}

inline int obey(const std::map<std::string, Command>& commands) {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream arguments(line);
    std::string name;
    arguments >> name;
    try {
      std::cout << commands.at(name)(arguments) << std::endl;
    } catch (const std::exception& error) {
      std::cout << "! " << kind_of(error) << ": " << error.what() << std::endl;
    }
  }
  return 0;
}

inline torchshm::LoadOptions mode_of(const std::string& mode) {
  return {mode == "r+"  ? torchshm::Mode::kReadWrite
          : mode == "c" ? torchshm::Mode::kCopyOnWrite
                        : torchshm::Mode::kRead,
          {}};
}

inline std::string joined(const std::vector<int64_t>& numbers) {
  std::string made;
  for (const int64_t n : numbers) made += (made.empty() ? "" : ",") + std::to_string(n);
  return made.empty() ? "-" : made;
}

inline std::string hex_of(const void* data, size_t size) {
  static const char* digits = "0123456789abcdef";
  std::string made;
  for (size_t i = 0; i < size; ++i) {
    const auto byte = static_cast<const unsigned char*>(data)[i];
    made += {digits[byte >> 4], digits[byte & 15]};
  }
  return made.empty() ? "-" : made;
}
