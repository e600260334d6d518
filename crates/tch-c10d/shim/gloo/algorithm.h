// Stand-ins for Gloo's headers, which libtorch does not ship. ProcessGroupGloo.hpp includes five of them,
// but only names their classes behind pointers: declarations are enough, and nothing here is ever
// constructed or derived from in this program. The classes themselves are in libtorch_cpu.so.
#pragma once
