// Lines of a text file such as those of /proc. Streams would do too, and bring a megabyte of
// locales into a library that links its C++ runtime statically.
#pragma once

#include <cstdio>
#include <string>

namespace lucid {

class Lines {
 public:
  explicit Lines(const std::string& path) : file_(std::fopen(path.c_str(), "re")) {}
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() {
    if (file_) std::fclose(file_);
  }

  // The next line without its end; false if there is none, or no such file.
  bool Next(std::string* line) {
    line->clear();
    char piece[256];
    while (file_ && std::fgets(piece, sizeof(piece), file_)) {
      *line += piece;
      if (line->back() != '\n') continue;
      line->pop_back();
      return true;
    }
    return !line->empty();
  }

 private:
  std::FILE* file_;
};

}  // namespace lucid
