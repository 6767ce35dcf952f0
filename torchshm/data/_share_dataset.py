def share_dataset(ds): return ds
