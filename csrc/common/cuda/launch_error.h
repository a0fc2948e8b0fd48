// What a launcher's error code means, for the message that op.cpp raises.
#pragma once

namespace bigkern {

// The text of a cudaError_t, or of the emulator's last fault; valid until the next launch.
const char* launch_error(int status);

}  // namespace bigkern
