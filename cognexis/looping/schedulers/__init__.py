"""Schedulers: what decides, after every loop, who runs another one."""
