// Functions that host and device code share.
#pragma once

#ifdef __CUDACC__
#define MEMLOC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MEMLOC_HOST_DEVICE inline
#endif
