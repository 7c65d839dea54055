"""The main job: train a small captioner of digit pairs on the layers of mmca_ext, and look at what it looks at.

python -m mmca_ext.demo train                   about a minute on two CPU cores; results in demo_output/
python -m mmca_ext.demo caption IMAGE           caption an image file with the trained model
torchrun --nproc-per-node 2 -m mmca_ext.demo train      the same, data-parallel
"""
