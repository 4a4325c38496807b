"""Ways to run a graph: lowering through Apache TVM, and the runtimes it is compared with."""
