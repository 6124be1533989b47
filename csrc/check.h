// CHECK(condition, parts...): throws std::invalid_argument (ValueError in Python) with the parts joined, values and all.
// FAIL(parts...) throws std::runtime_error (RuntimeError): the caller did nothing wrong, something else did. Nothing exits.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace gptoss {

template <class T>
void append_part(std::ostream& out, const T& part) {
  out << part;
}

template <class T>
void append_part(std::ostream& out, const std::vector<T>& parts) {
  out << '[';
  for (size_t i = 0; i < parts.size(); ++i) out << (i ? ", " : "") << parts[i];
  out << ']';
}

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream out;
  (append_part(out, parts), ...);
  return out.str();
}

#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition)) throw std::invalid_argument(::gptoss::join(__VA_ARGS__)); \
  } while (0)

#define FAIL(...) throw std::runtime_error(::gptoss::join(__VA_ARGS__))

}  // namespace gptoss
