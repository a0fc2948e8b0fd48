// What the compiler made of one kernel; sizes in bytes.
#pragma once

namespace bigkern {

struct KernelInfo {
  const char* name;
  int registers;
  int spills;  // local memory per thread: spills and arrays that could not stay in registers
  int static_smem;
  int dynamic_smem;
  int max_threads;
};

}  // namespace bigkern
