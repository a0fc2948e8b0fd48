// What foreach_isa.h defines, for the portable level: so that an editor, or a linter, understands
// an .inl that it reads by itself. No build includes this file.
#pragma once

#define BIGKERN_ISA portable
#define BIGKERN_LEVEL 0
#define BIGKERN_FN
