"""What the tests stand on: the meaning of every op (`reference`), shapes that break things (`shapes`), comparisons
that know how much error a dtype is allowed (`compare`). Useful to anyone who writes a kernel against these ops."""
