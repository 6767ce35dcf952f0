// The file that a program of this folder leaves for campaign.py: what it was, what it counted, what it found wrong.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace torchshm::torture {

struct ResultFile {
  std::string name;
  uint64_t seed = 0;
  bool full = false;
  double seconds = 0;
  std::vector<std::pair<std::string, std::string>> figures;  // the second as JSON writes it
  std::vector<std::string> violations;

  template <class Numbers>
  void count(const Numbers& numbers) {
    for (const auto& [label, number] : numbers) figures.emplace_back(label, std::to_string(number));
  }
  // Nothing where the path is empty; ends the program where it can't be written.
  void write(const std::string& path) const {
    if (path.empty()) return;
    std::error_code ignored;
    std::filesystem::create_directories(std::filesystem::absolute(path).parent_path(), ignored);
    std::ofstream out(path);
    out << "{\"name\": " << quoted(name) << ", \"seed\": " << seed << ", \"full\": " << (full ? "true" : "false")
        << ", \"seconds\": " << seconds << ",\n \"figures\": {";
    for (size_t i = 0; i < figures.size(); ++i)
      out << (i == 0 ? "\n  " : ",\n  ") << quoted(figures[i].first) << ": " << figures[i].second;
    out << "\n },\n \"violations\": [";
    for (size_t i = 0; i < violations.size(); ++i) out << (i == 0 ? "" : ", ") << quoted(violations[i]);
    out << "]}\n";
    if (out.flush()) return;
    std::perror(path.c_str());
    std::exit(2);
  }

 private:
  static std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') out += '\\';
      out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    return out + '"';
  }
};

}  // namespace torchshm::torture
