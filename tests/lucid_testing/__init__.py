"""What the tests share: no test is in here, and no test module imports another one."""
