// The options of bench_forward and bench_ops_cuda: --name value or --name a,b,c, and --json alone.
#pragma once
#include <charconv>
#include <cstdio>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace gptoss::bench {

class Options {
 public:
  // defaults: every option there is, with the value that it has when it is not given.
  Options(int argc, char** argv, std::map<std::string, std::string> defaults) : values_(std::move(defaults)) {
    for (int i = 1; i < argc; ++i) {
      const std::string name = std::strncmp(argv[i], "--", 2) == 0 ? argv[i] + 2 : "";
      if (name == "json") {
        json_ = true;
        continue;
      }
      CHECK(values_.count(name), "unknown option ", argv[i]);
      CHECK(i + 1 < argc, argv[i], " needs a value");
      values_[name] = argv[++i];
    }
  }

  bool json() const { return json_; }
  const std::string& text(const std::string& name) const { return values_.at(name); }

  // What stands between the commas; nothing of an empty value.
  std::vector<std::string> texts(const std::string& name) const {
    std::vector<std::string> parts;
    std::stringstream stream(text(name));
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
  }

  // Each is `least` or more.
  std::vector<int64_t> numbers(const std::string& name, int64_t least = 0) const {
    std::vector<int64_t> numbers;
    for (const std::string& part : texts(name)) {
      const char* end = part.data() + part.size();
      int64_t number = 0;
      const auto result = std::from_chars(part.data(), end, number);
      CHECK(result.ec == std::errc() && result.ptr == end && number >= least, "--", name, ": not a whole number from ", least,
            " on: \"", part, '"');
      numbers.push_back(number);
    }
    CHECK(!numbers.empty(), "--", name, " needs a number");
    return numbers;
  }

  int64_t number(const std::string& name, int64_t least = 0) const {
    const std::vector<int64_t> all = numbers(name, least);
    CHECK(all.size() == 1, "--", name, " takes one number, not ", all.size());
    return all[0];
  }

 private:
  std::map<std::string, std::string> values_;
  bool json_ = false;
};

// The exit status of a program that does `run`; an error goes to stderr.
template <class Run>
int exit_status(const char* program, const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return 1;
  }
}

}  // namespace gptoss::bench
