// Runs the test cases named on the command line, or all of them.
#include <cstring>

#include "check.h"

int main(int argc, char** argv) {
  int ran = 0;
  for (const check::Case& test : check::cases()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= strcmp(argv[i], test.name) == 0;
    if (!wanted) continue;
    test.run();
    std::cout << test.name << ": passed" << std::endl;
    ++ran;
  }
  if (ran == 0) std::cerr << "no such test case" << std::endl;
  return ran == 0;
}
