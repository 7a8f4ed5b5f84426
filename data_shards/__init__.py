"""Data set recipes: each file says where one data set keeps its images and labels, nothing else."""
