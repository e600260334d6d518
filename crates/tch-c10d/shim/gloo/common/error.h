// See ../algorithm.h.
#pragma once
#include <chrono>
