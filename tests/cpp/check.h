// Test cases for the C++ tests, as small as it gets:
//
//   TEST(adds) { CHECK(1 + 1 == 2); CHECK_EQ(1 + 1, 2); }
//
// Every source with a TEST is linked with main.cpp; `test_x adds` runs one case, `test_x` all of
// them. The build reads the names of the cases from the lines that begin with TEST.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <vector>

namespace check {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

// The exit status by which a case says that this machine cannot run it.
constexpr int kSkipped = 77;

[[noreturn]] inline void fail(const char* file, int line) {
  std::cerr << file << ":" << line << ": check failed" << std::endl;
  exit(1);
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                               \
  do {                                                 \
    if (!(condition)) {                                \
      std::cerr << "not true: " << #condition << "\n"; \
      check::fail(__FILE__, __LINE__);                 \
    }                                                  \
  } while (false)

#define CHECK_EQ(left, right)                                                               \
  do {                                                                                      \
    const auto left_value = (left);                                                         \
    const auto right_value = (right);                                                       \
    if (!(left_value == right_value)) {                                                     \
      std::cerr << #left << " is " << left_value << ", " << #right << " is " << right_value \
                << "\n";                                                                    \
      check::fail(__FILE__, __LINE__);                                                      \
    }                                                                                       \
  } while (false)
