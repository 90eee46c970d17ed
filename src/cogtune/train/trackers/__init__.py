"""Where a run can be watched besides its folder: TensorBoard, Weights & Biases, MLflow, SwanLab, Trackio.

`base.Tracker` is what each of them does, one module per package; `delivery.Delivery` keeps a slow or failing one from
holding the run; `opening.opened` opens those that the configuration names.
"""
