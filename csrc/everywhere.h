// Marks a function that runs on the host and on the GPU.
#pragma once

#ifdef __CUDACC__
#define YOLOV4_FAST_EVERYWHERE __host__ __device__
#else
#define YOLOV4_FAST_EVERYWHERE
#endif
