// A write past the end (argument 1) and a race in shared memory (argument 2): what compute-sanitizer must find, or what
// it does not find elsewhere means nothing. In alula's namespace, since prove.py has only that checked.
#include <cstdio>
#include <cstdlib>

namespace alula {

__global__ void write_past_end(float* x, int n) { x[n] = 1.0f; }

__global__ void race(float* x) {
  __shared__ float values[64];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  x[threadIdx.x] = values[63 - threadIdx.x];  // no barrier before it
}

}  // namespace alula

int main(int count, char** arguments) {
  float* x = nullptr;
  cudaMalloc(&x, 64 * sizeof(float));
  if (count > 1 && std::atoi(arguments[1]) == 1) {
    alula::write_past_end<<<1, 1>>>(x, 64);
  } else {
    alula::race<<<1, 64>>>(x);
  }
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
