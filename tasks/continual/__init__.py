"""The continual protocol: experts arrive one by one, and after each all tasks seen so far are tested.

python -m tasks.continual --config configs/continual/text6.yaml
"""
