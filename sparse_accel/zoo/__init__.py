"""What `zoo:` stubs stand for now that SparseZoo's service has ended; `sparse_accel.zoo.resolving` is the way in."""
