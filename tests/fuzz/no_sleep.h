// Claims at the limit wait for chunks that others are giving back: not in a program that includes this. Private to the fuzz targets, once each.
#pragma once

#include <ctime>

extern "C" int nanosleep(const timespec*, timespec*) { return 0; }
extern "C" int clock_nanosleep(clockid_t, int, const timespec*, timespec*) { return 0; }
