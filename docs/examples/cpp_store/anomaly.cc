// Takes a temperature field that Python has saved, and saves by how much each value differs from the mean. Neither is copied:
//
//   >>> store = torchshm.start("era5")
//   >>> store["t2m"] = xarray.tutorial.open_dataset("air_temperature").air.values
//   $ ./anomaly era5 t2m
//   >>> store.load("t2m_anomaly", timeout=10)
#include <torchshm/store.h>

#include <cstdio>
#include <numeric>

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "Usage: anomaly STORE KEY\n");
    return 2;
  }
  try {
    const auto store = torchshm::Store::connect(arguments[1]);
    const std::string key = arguments[2];

    const torchshm::Array field = store.load(key, {torchshm::Mode::kRead, std::chrono::seconds(10)});
    if (!field.is_contiguous()) throw torchshm::TypeError(key + " is not C-contiguous");
    const auto* values = field.data_as<const float>();
    const int64_t size = field.size();
    const double mean = std::accumulate(values, values + size, 0.0) / static_cast<double>(size);

    // In the store's memory from the start.
    torchshm::Array anomaly = store.empty(field.dtype, field.shape);
    auto* differences = anomaly.data_as<float>();
    for (int64_t i = 0; i < size; ++i) differences[i] = static_cast<float>(values[i] - mean);
    store.save(key + "_anomaly", anomaly, {/*overwrite=*/true});
    std::printf("%lld values, mean %.3f\n", static_cast<long long>(size), mean);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
